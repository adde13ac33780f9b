"""Role and block from the graph alone, where names tell nothing.

q, k and v share an input and meet in attention, which feeds o; gate and up share an input and meet in a Mul,
which feeds down; a single up feeds down through an activation function; lm_head is the last and the widest.
Walks go forward from a linear layer, stop at the next one, and are short, so the time is linear.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import onnx_graphsurgeon as gs

from nmonnx.sites.linear import Linear, Product
from nmonnx.sites.scope import Scope, Use

_REACH = 64
"""Nodes visited from one linear layer; the longest way to attention in the exports seen takes about 30."""

_ATTENTION = {"Attention", "GroupQueryAttention", "MultiHeadAttention", "PagedAttention", "SparseAttention"}
_PRODUCTS = {"MatMul", "FusedMatMul", "Einsum"}
_ACTIVATION = {
    *("Sigmoid", "Relu", "Gelu", "FastGelu", "QuickGelu", "BiasGelu", "Erf", "Tanh", "Elu", "HardSwish"),
    *("Swish", "Softplus", "Clip", "LeakyRelu", "Mish"),
}
_ALONG = {"Mul", "Div", "Add", "Pow", "Sqrt", "Cast", "Identity", "Reshape", "QuantizeLinear", "Squeeze"} | {
    *("DequantizeLinear", "DynamicQuantizeLinear", "Unsqueeze", "Flatten"),
}
_SAME = _ALONG - {"Mul", "Div", "Add", "Pow", "Sqrt"}
_PARTS = {"Split", "Slice", "Gather"}


def infer(products: list[Product]) -> list[Product]:
    """The products with the roles and blocks that names left open filled in from the structure."""
    by_scope: dict[int, list[Product]] = {}
    for product in products:
        by_scope.setdefault(id(product.scope), []).append(product)
    told: dict[int, tuple[str | None, int | None]] = {}
    for members in by_scope.values():
        layers = Counter(id(p.node) for p in members)  # a call may hold several; only their names tell those apart
        linears = [p for p in members if isinstance(p.reading, Linear) and layers[id(p.node)] == 1]
        if any(p.role is None or (p.block is None and p.role != "lm_head") for p in linears):
            told |= _Structure(members[0].scope, linears).read()
    return [replace(p, role=t[0], block=t[1]) if (t := told.get(id(p.node))) else p for p in products]


@dataclass(eq=False)
class _Walk:
    """What lies ahead of one tensor, up to the next linear layers and attention products."""

    linears: list[gs.Node]
    cores: list[Use]
    uses: list[Use]


class _Structure:
    """One scope: `roles` starts with what names tell and is filled in."""

    def __init__(self, scope: Scope, linears: list[Product]) -> None:
        self.scope = scope
        self.linears = linears
        self.nodes: Mapping[int, Product] = {id(p.node): p for p in linears}
        self.own = {id(n) for n in scope.graph.nodes}
        self.roles: dict[int, str | None] = {id(p.node): p.role for p in linears}
        self._scores: dict[int, bool] = {}

    def read(self) -> dict[int, tuple[str | None, int | None]]:
        self._attention()
        for group in self._groups(p for p in self.linears if self.roles[id(p.node)] is None):
            self._gated(group)
        for product in self.linears:
            if self.roles[id(product.node)] is None:
                self._feed_forward(product)
        self._routers()
        self._lm_head()
        blocks = self._blocks()
        return {key: (role, blocks.get(key)) for key, role in self.roles.items()}

    def _attention(self) -> None:
        for product in self.linears:
            walk = self._walk(product.node.outputs)
            parts = {part for use in walk.cores for part in self._parts(use)}
            if parts:
                self._tell(product.node, parts.pop() if len(parts) == 1 else "qkv")
            for core in walk.cores:
                if core.node.op in _ATTENTION or not self._is_scores(core.node):
                    for output in self._walk(core.node.outputs[:1]).linears:
                        self._tell(output, "o")

    def _parts(self, use: Use) -> Iterator[str]:
        """Which of q, k, v an input of attention is."""
        node, index = use
        if node.op in _ATTENTION:
            packed = index == 0 and not any(t.name for t in node.inputs[1:3])
            yield from ("q", "k", "v") if packed else ("q", "k", "v")[index : index + 1]
        elif self._is_scores(node):
            yield ("q", "k")[index]
        elif index == 1:
            yield "v"

    def _is_scores(self, node: gs.Node) -> bool:
        """The product before the Softmax; the one after it takes v."""
        if id(node) not in self._scores:
            uses = self._walk(node.outputs).uses
            self._scores[id(node)] = any(u.node.op in ("Softmax", "BiasSoftmax") for u in uses)
        return self._scores[id(node)]

    def _source(self, product: Product) -> str:
        """Name of the activation before it was reshaped, cast or quantised for this layer."""
        assert isinstance(product.reading, Linear)
        tensor = product.node.inputs[product.reading.port]
        for _ in range(_REACH):
            made = self.scope.producer(tensor)
            if made is None or made[1].op not in _SAME:
                break
            tensor = made[1].inputs[0]
        return tensor.name

    def _groups(self, products: Iterable[Product]) -> list[list[Product]]:
        groups: dict[str, list[Product]] = {}
        for product in products:
            groups.setdefault(self._source(product), []).append(product)
        return [g for g in groups.values() if len(g) > 1]

    def _gated(self, group: list[Product]) -> None:
        """gate -> activation function -> Mul <- up; the Mul feeds down."""
        ways = {id(p.node): self._walk(p.node.outputs, _ALONG | _ACTIVATION).uses for p in group}
        for up in group:
            for meeting in (u.node for u in ways[id(up.node)] if u.node.op == "Mul"):
                gate = next((p for p in group if p is not up and self._meets(ways[id(p.node)], meeting)), None)
                if gate and not self._meets_activated(ways[id(up.node)], meeting):
                    self._tell(gate.node, "gate")
                    self._tell(up.node, "up")
                    for down in self._walk(meeting.outputs, _ALONG - {"Add"}).linears:
                        self._tell(down, "down")
                    return

    def _meets(self, uses: list[Use], meeting: gs.Node) -> bool:
        return any(u.node is meeting for u in uses) and self._meets_activated(uses, meeting)

    def _meets_activated(self, uses: list[Use], meeting: gs.Node) -> bool:
        """An activation function lies on the way to `meeting`."""
        before = uses[: next((i for i, u in enumerate(uses) if u.node is meeting), 0)]
        return any(u.node.op in _ACTIVATION for u in before)

    def _feed_forward(self, product: Product) -> None:
        walk = self._walk(product.node.outputs, _ALONG | _ACTIVATION | _PARTS)
        ops = {u.node.op for u in walk.uses}
        if len(walk.linears) == 1 and ops & _ACTIVATION and self._returns(product, walk.linears[0]):
            self._tell(product.node, "gate_up" if ops & _PARTS and "Mul" in ops else "up")
            self._tell(walk.linears[0], "down")

    def _returns(self, up: Product, down: gs.Node) -> bool:
        """`down` leads back into the residual stream: to the width `up` started from, and not out of the model."""
        if down.outputs[0].name in self.scope.outputs:
            return False
        last = self.nodes[id(down)].reading
        return isinstance(up.reading, Linear) and isinstance(last, Linear) and up.reading.k == last.n

    def _routers(self) -> None:
        """A narrow layer whose outputs are ranked to choose experts."""
        for product in self.linears:
            if self.roles[id(product.node)] is None and isinstance(product.reading, Linear):
                ops = {u.node.op for u in self._walk(product.node.outputs).uses}
                if "TopK" in ops and product.reading.n < product.reading.k:
                    self._tell(product.node, "router")

    def _lm_head(self) -> None:
        """The last linear layer of a decoder, or the one that reads the embedding table."""
        known = {role for role in self.roles.values() if role}
        tables = _tables(self.scope)
        for product in self.linears:
            if isinstance(product.reading, Linear) and product.reading.weight.name in tables:
                self._tell(product.node, "lm_head")
        last = self.linears[-1] if self.linears else None
        if last is None or not known & {"q", "qkv", "down"} or "lm_head" in known:
            return
        assert isinstance(last.reading, Linear)
        widest = all(last.reading.n > p.reading.n for p in self.linears[:-1] if isinstance(p.reading, Linear))
        if widest and not self._walk(last.node.outputs).linears:
            self._tell(last.node, "lm_head")

    def _blocks(self) -> dict[int, int | None]:
        """Blocks counted by the inputs of attention; names win, and where they disagree nothing is filled in."""
        counted: dict[int, int | None] = {}
        inputs: dict[str, int] = {}
        for product in self.linears:
            role = self.roles[id(product.node)]
            if role in ("q", "k", "v", "qkv"):
                inputs.setdefault(self._source(product), len(inputs))
            numbered = inputs and role not in (None, "lm_head", "other")
            counted[id(product.node)] = len(inputs) - 1 if numbered else None
        named = {id(p.node): p.block for p in self.linears}
        agree = all(counted[key] == block for key, block in named.items() if block is not None)
        return counted if agree and not self.scope.is_function else named

    def _tell(self, node: gs.Node, role: str) -> None:
        if self.roles.get(id(node), role) is None:
            self.roles[id(node)] = role

    def _walk(self, outputs: Iterable[gs.Tensor], through: set[str] | None = None) -> _Walk:
        """Breadth first from `outputs`, through the given operators only (any, when None)."""
        walk, visited = _Walk([], [], []), 0
        linears: dict[int, gs.Node] = {}
        waiting = deque(_uses(self.scope, outputs))
        seen: set[tuple[int, int]] = set()
        while waiting and visited < _REACH:
            use = waiting.popleft()
            node = use.node
            if (id(node), use.port) in seen or id(node) not in self.own or _is_aside(use):
                continue
            seen.add((id(node), use.port))
            visited += 1
            if id(node) in self.nodes:
                linears[id(node)] = node
                continue
            if node.op in _ATTENTION or node.op in _PRODUCTS:
                walk.cores.append(use)
                continue
            walk.uses.append(use)
            if through is None or node.op in through:
                outputs = node.outputs[:1] if node.op == "DynamicQuantizeLinear" else node.outputs
                waiting.extend(_uses(self.scope, outputs))
        walk.linears.extend(linears.values())
        return walk


def _uses(scope: Scope, outputs: Iterable[gs.Tensor]) -> Iterator[Use]:
    for output in outputs:
        yield from scope.uses_of(output.name)


def _is_aside(use: Use) -> bool:
    """The values do not go on from here, only their shape or type."""
    return use.node.op in ("Shape", "Size") or (use.node.op == "CastLike" and use.port == 1)


def _tables(scope: Scope) -> set[str]:
    """Names of the tensors that Gather picks rows of, here and in the graphs around, through a Transpose too."""
    names: set[str] = set()
    around: Scope | None = scope
    while around is not None:
        for node in around.graph.nodes:
            if node.op == "Gather" and node.inputs:
                made = around.producer(node.inputs[0])
                turned = made is not None and made[1].op in ("Transpose", "Identity")
                names.add(made[1].inputs[0].name if made and turned else node.inputs[0].name)
        around = around.parent
    return names

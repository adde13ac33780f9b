"""The linear layers of a model, dense or converted, with the bytes of weights that a call reads of each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_graphsurgeon as gs
from onnx import SparseTensorProto, TensorProto

from nmonnx.errors import UsageError
from nmonnx.onnx_file.graph import DOMAIN, Model
from nmonnx.onnx_file.tensors import byte_size
from nmonnx.passes.token_policy import TokenPolicy
from nmonnx.pruning.recipe import Recipe
from nmonnx.sites import Site, Skipped, find_sites
from nmonnx.sites.calls import Calls
from nmonnx.sites.roles import role_of
from nmonnx.sites.scope import Formal, Scope, domain_of, read_scopes

_ROWS = {"NMMatMul": (1,), "NMMatMulNBits": (1,)}
_WHOLE = {"NMMatMulNBits": (2, 3)}
"""Inputs of the ops that skip rows: the weight, of which they read the kept rows, and what they read whole (scales and
zero points: every group of rows has kept ones)."""

_STOCK = {
    "MatMulNBits": (1, 2, 3),
    "MatMulBnb4": (1, 2),
    "MatMulInteger": (1, 3),
    "QLinearMatMul": (3, 4, 5),
    "DynamicQuantizeMatMul": (1, 2, 3),
    "MatMulIntegerToFloat": (1, 3, 5),
    "QGemm": (3, 4, 5),
    "QAttention": (1, 4, 7),
    "MoE": (2, 4, 6),
    "QMoE": (2, 3, 5, 6, 8, 9, 11, 12, 13),
}
"""Inputs of stock operators that hold the weight, its scales and zero points, of all experts where there are some; of
the others the first two."""

INLINED = "_inlfunc_"
"""How ONNX Runtime begins the name of a node of a function, which it puts in the place of each call."""

_EVERY_TOKEN = TokenPolicy()

_STEPS = 12
"""Operators between a stored weight and its layer, at most."""


@dataclass(frozen=True)
class Layer:
    """A linear layer.

    name    of the site that it is, the same in the original and its conversions
    stored  bytes of its weight with scales and zero points, as they are in the file
    kept    bytes of them that one pruned token reads; all of them where no op skips rows
    policy  the tokens that stay dense
    """

    name: str
    role: str
    op: str
    stored: int
    kept: int
    policy: TokenPolicy = _EVERY_TOKEN

    def read(self, tokens: int, past: int) -> int:
        """Bytes that a call of `tokens` tokens behind `past` others touches. Several tokens keep different channels:
        all rows count as read, which for 2 to 5 tokens is the most it can be."""
        pruned = self.policy.phase != "prefill" and past >= self.policy.dense_prefix
        return self.kept if tokens == 1 and pruned else self.stored


@dataclass(frozen=True)
class Layers:
    """linear  the linear layers in the order of the graph
    served  the nodes by the name that ONNX Runtime gives them, each with the sites that it is there for
    roles   of the sites
    """

    linear: tuple[Layer, ...]
    served: Mapping[str, tuple[str, ...]]
    roles: Mapping[str, str]


def read_layers(model: Model) -> Layers:
    """The layers of a model: what `find_sites` finds in stock operators, and the nodes that a conversion put there.
    No weight is read."""
    found = find_sites(model)
    stock: dict[tuple[str, str], list[Site | Skipped]] = {}
    linear: list[Site | Skipped] = [*found.sites, *(s for s in found.skipped if s.linear)]
    for site in linear:
        stock.setdefault((site.scope, site.output), []).append(site)
    return _Reader(model, stock).read()


class _Reader:
    """One walk over the nodes."""

    def __init__(self, model: Model, stock: Mapping[tuple[str, str], list[Site | Skipped]]) -> None:
        self._model, self._stock = model, stock
        self._scopes = read_scopes(model)
        self._calls = Calls(model, self._scopes)
        self._policy = _policy(model)

    def read(self) -> Layers:
        linear: list[Layer] = []
        served: dict[str, tuple[str, ...]] = {}
        roles: dict[str, str] = {}
        for scope in self._scopes:
            for label, node in _labelled(scope):
                layers = self._layers(scope, node)
                served[label] = self._sites_of(node) or tuple(layer.name for layer in layers)
                linear += layers
                roles |= {layer.name: layer.role for layer in layers}
        return Layers(tuple(linear), served, roles)

    def _layers(self, scope: Scope, node: gs.Node) -> list[Layer]:
        """One or none; of a call of a function those inside that are its own, of fused experts the first for all."""
        if node.domain == DOMAIN and node.op in _ROWS:
            return [self._skipping(scope, node)]
        sites = self._stock.get((scope.path, node.outputs[0].name), []) if node.outputs else []
        if self._calls.body_of(node) is None:
            stored = self._bytes(scope, node, _STOCK.get(node.op, (0, 1)))
            return [Layer(site.name, site.role, node.op, stored, stored) for site in sites[:1]]
        sizes = [self._size(scope, getattr(site, "initializer", "")) for site in sites]
        return [Layer(s.name, s.role, s.op, size, size) for s, size in zip(sites, sizes, strict=True)]

    def _skipping(self, scope: Scope, node: gs.Node) -> Layer:
        name = next(iter(self._sites_of(node)), node.name or node.outputs[0].name)
        texts = (name, *(t.name for t in node.inputs[1:2]))
        rows, whole = self._bytes(scope, node, _ROWS[node.op]), self._bytes(scope, node, _WHOLE.get(node.op, ()))
        channels = self._channels(scope, node.inputs[1])
        kept = rows * _kept(channels, node.attrs["keep"], node.attrs["group"]) // max(1, channels)
        told = self._policy if any(t.name.startswith("nmonnx/dense") for t in node.inputs) else _EVERY_TOKEN
        return Layer(name, role_of(texts) or "other", node.op, rows + whole, kept + whole, told)

    def _sites_of(self, node: gs.Node) -> tuple[str, ...]:
        """What the conversion recorded on a node that it made."""
        return tuple(json.loads(self._model.props_of(node).get("nmonnx.site", "[]")))

    def _bytes(self, scope: Scope, node: gs.Node, ports: tuple[int, ...]) -> int:
        tensors = [node.inputs[port] for port in ports if port < len(node.inputs)]
        return sum(byte_size(proto) for tensor in tensors for proto in self._stored(scope, tensor))

    def _size(self, scope: Scope, initializer: str) -> int:
        return sum(byte_size(proto) for proto in self._stored(scope, gs.Variable(initializer)))

    def _channels(self, scope: Scope, weight: gs.Tensor) -> int:
        return next((proto.dims[0] for proto in self._stored(scope, weight) if proto.dims), 0)

    def _stored(self, scope: Scope, tensor: gs.Tensor, steps: int = _STEPS) -> list[TensorProto]:
        """The stored tensors that a tensor is made of in so many steps at most, in a function those of every call. None
        when anything else goes into it."""
        found = scope.find(tensor.name) if tensor.name else None
        if found is None or not steps:
            return []
        home, definition = found
        if isinstance(definition, TensorProto):
            return [definition]
        if isinstance(definition, SparseTensorProto):
            return [definition.values, definition.indices]
        if isinstance(definition, gs.Node):
            return self._made(home, definition, steps - 1)
        if isinstance(definition, Formal):
            calls = self._calls.of(home)
            return [p for caller, call in calls for p in self._stored(caller, call.inputs[definition.index], steps - 1)]
        return [definition.default] if isinstance(definition.default, TensorProto) else []

    def _made(self, scope: Scope, node: gs.Node, steps: int) -> list[TensorProto]:
        if node.op == "Constant":
            return [a.t for a in self._model.origin[id(node)].attribute if a.name == "value"]
        protos: list[TensorProto] = []
        for tensor in node.inputs:
            part = self._stored(scope, tensor, steps)
            if tensor.name and not part:
                return []
            protos += part
        return protos


def _labelled(scope: Scope) -> Iterator[tuple[str, gs.Node]]:
    """The nodes by the name that ONNX Runtime gives them: in a function after it; one of the main graph that has none
    after its operator and its place among those that compute."""
    front = f"{INLINED}{scope.graph.name}_" if scope.is_function else ""
    computing = [node for node in scope.graph.nodes if not (domain_of(node) == "" and node.op == "Constant")]
    for index, node in enumerate(computing):
        yield front + (node.name or f"{node.op}_{index}" if not scope.path else node.name), node


def _kept(channels: int, keep: int, group: int) -> int:
    """Channels that one token keeps; a shorter last group keeps min(keep, its size)."""
    return channels // group * keep + min(keep, channels % group)


def _policy(model: Model) -> TokenPolicy:
    metadata = {p.key: p.value for p in model.proto.metadata_props}
    try:
        recipe = Recipe.from_dict(json.loads(metadata.get("nmonnx.recipe", "{}")), str(model.path))
    except (ValueError, UsageError):
        return _EVERY_TOKEN
    return TokenPolicy(recipe.phase, recipe.dense_prefix)

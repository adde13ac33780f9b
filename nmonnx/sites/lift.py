"""Linear layers that are a function of what each call brings: told as layers of the calls, not of the body."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import onnx_graphsurgeon as gs

from nmonnx.sites.linear import Left, Linear, Reading
from nmonnx.sites.scope import Formal, Scope, Use
from nmonnx.sites.trace import Tracer

MOST = 256
"""Layers lifted out of one body; and runs of a body looked at; bounds the work on functions that call functions."""

Chain = tuple[gs.Node, ...]
"""A linear layer seen from outside: the calls that lead to it, and the layer at the end."""


@dataclass(frozen=True, eq=False)
class Lifted:
    """A linear layer of a function body that belongs to each call. `port`: the input that holds the activation."""

    chain: Chain
    port: int


class Lifter:
    """Says which linear layers of function bodies belong to the calls.

    1. Only in a function that runs more than once, and of a layer whose weight and activation both come from the
       caller, where the body reads that activation for nothing else: then the input of the call can be pruned.
    2. A function that is one linear layer (a module Linear, aten_linear) is lifted always: each call is a layer.
    3. Of a function with several only what has to be: weights that have a different shape in each call. The others
       are pruned inside the body, where they can be fused.
    """

    def __init__(self, tracer: Tracer, read: Callable[[Scope, gs.Node], Reading]) -> None:
        self._calls = tracer.calls
        self._read = read
        self._known: dict[int, tuple[Lifted, ...]] = {}

    def layers(self, scope: Scope, node: gs.Node) -> Iterator[tuple[Lifted, Reading]]:
        """The layers of a call that stay with it, each as this call sees it."""
        for lifted in self._of_call(node):
            chain = (node, *lifted.chain)
            if not self.is_lifted(scope, chain):
                reading = self._along(scope, chain)
                moved = isinstance(reading, Linear) and reading.port != lifted.port
                yield lifted, Left("calls of its function bring its weight by different inputs") if moved else reading

    def is_lifted(self, scope: Scope, chain: Chain) -> bool:
        """The layer belongs to the calls of the function whose body `scope` is."""
        return scope.is_function and any(_is_same(lifted.chain, chain) for lifted in self._of_body(scope))

    def _of_call(self, node: gs.Node) -> tuple[Lifted, ...]:
        body = self._calls.body_of(node)
        return self._of_body(body) if body is not None else ()

    def _of_body(self, body: Scope) -> tuple[Lifted, ...]:
        if id(body) not in self._known:
            self._known[id(body)] = ()
            self._known[id(body)] = self._lifted(body) if self._calls.is_shared(body) else ()
        return self._known[id(body)]

    def _lifted(self, body: Scope) -> tuple[Lifted, ...]:
        linears = list(self._linears(body))
        groups: dict[str, list[tuple[Chain, int]]] = {}
        for chain, port in linears:
            activation = chain[0].inputs[port].name
            if self._is_brought(body, chain):
                groups.setdefault(activation, []).append((chain, port))
        lifted = [
            Lifted(chain, formal.index)
            for activation, group in groups.items()
            if isinstance(formal := body.defined.get(activation), Formal) and _feeds_only(body, activation, group)
            if len(linears) == 1 or self._differ(body, group)
            for chain, _ in group
        ]
        return tuple(lifted) if len(lifted) <= MOST else ()

    def _linears(self, body: Scope) -> Iterator[tuple[Chain, int]]:
        """The linear layers of a body, as the first run sees them to which they are one, each with the input of the
        chain's first node that holds the activation."""
        views = list(islice(self._views(body), MOST))
        for node in body.graph.nodes:
            chains = [(node, *lifted.chain) for lifted in self._of_call(node)] or [(node,)]
            for chain in chains:
                readings = (self._along(view, chain) for view in views)
                first = next((r for r in readings if isinstance(r, Linear) or r is None), None)
                if isinstance(first, Linear) and not first.codes:
                    yield chain, first.port

    def _views(self, body: Scope) -> Iterator[Scope]:
        """The body as each of its runs sees it."""
        for scope, node in self._calls.of(body):
            for caller in self._views(scope) if scope.is_function else (scope,):
                yield self._calls.view(body, (caller, node))

    def _is_brought(self, body: Scope, chain: Chain) -> bool:
        """Without a call there is no weight."""
        return not isinstance(self._along(self._calls.view(body), chain), Linear)

    def _differ(self, body: Scope, group: list[tuple[Chain, int]]) -> bool:
        return any(not isinstance(self._along(body, chain), Linear) for chain, _ in group)

    def _along(self, scope: Scope, chain: Chain) -> Reading:
        """What the layer at the end of the chain is to the node at its start."""
        node, *rest = chain
        if not rest:
            return self._read(scope, node)
        body = self._calls.body_of(node)
        assert body is not None
        reading = self._along(self._calls.view(body, (scope, node)), tuple(rest))
        if not isinstance(reading, Linear):
            return reading
        formal = body.defined.get(rest[0].inputs[reading.port].name)
        if not isinstance(formal, Formal):
            return Left("calls of its function bring its weight by different inputs")
        reason = f"it lies inside the function {node.op}"
        return replace(reading, port=formal.index, fusable=None, quantised=None, not_fusable=reason)


def _is_same(a: Chain, b: Chain) -> bool:
    return [id(node) for node in a] == [id(node) for node in b]  # nodes compare by content


def _feeds_only(body: Scope, activation: str, group: list[tuple[Chain, int]]) -> bool:
    ports = {(id(chain[0]), port) for chain, port in group}
    uses: list[Use] = body.uses_of(activation)
    return activation not in body.outputs and all((id(use.node), use.port) in ports for use in uses)

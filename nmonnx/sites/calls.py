"""Which calls run a function body, and what the body is to some of them only."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import TypeAlias

import onnx
import onnx_graphsurgeon as gs

from nmonnx.onnx_file.graph import Model
from nmonnx.sites.scope import Scope, domain_of

Call: TypeAlias = tuple[Scope, gs.Node]
"""The scope that a call lies in, and the call."""


class Calls:
    """The calls of model-local functions; those inside a function that nothing calls do not count."""

    def __init__(self, model: Model, scopes: Sequence[Scope]) -> None:
        self._of: dict[int, list[Call]] = {}
        self._runs: dict[int, int] = {}
        self._views: dict[tuple[int, ...], Scope] = {}
        protos = {id(f): p for f, p in zip(model.graph.functions, model.proto.functions, strict=True)}
        self._defaults = {id(s): _defaults(protos[id(s.graph)]) for s in scopes if s.is_function}
        bodies = {_key(protos[id(s.graph)]): s for s in scopes if s.is_function}
        nodes = {id(s): [n for n in s.graph.nodes if _called_by(model, n) in bodies] for s in scopes}
        self._bodies = {id(n): bodies[_called_by(model, n)] for called in nodes.values() for n in called}
        self._follow(scopes, nodes)

    def body_of(self, node: gs.Node) -> Scope | None:
        """The body of the function that a node calls."""
        return self._bodies.get(id(node))

    def of(self, body: Scope) -> list[Call]:
        """The calls that fill in the inputs of a body, or of a view of it."""
        return self._of.get(id(body), [])

    def is_shared(self, scope: Scope) -> bool:
        """The scope belongs to a function that runs more than once."""
        return self._count(_root(scope)) > 1

    def view(self, body: Scope, *calls: Call) -> Scope:
        """The body as these of its calls alone fill it in; with none, its inputs are unknown."""
        key = (id(body), *(part for scope, node in calls for part in (id(scope), id(node))))
        if key not in self._views:
            self._views[key] = replace(body)
            self._of[id(self._views[key])] = list(calls)
        return self._views[key]

    def with_attributes(self, scope: Scope, node: gs.Node) -> gs.Node | None:
        """The node with those attributes filled in that its function takes from the calls; None where they differ."""
        references = {k: v for k, v in node.attrs.items() if isinstance(v, gs.Node.AttributeRef)}
        if not references:
            return node
        calls = self.of(_root(scope))
        given = [{k: self._attribute(call, v.name) for k, v in references.items()} for call in calls]
        if not given or any(repr(g) != repr(given[0]) for g in given):
            return None
        filled = copy(node)
        filled.attrs = {k: v for k, v in {**node.attrs, **given[0]}.items() if v is not None}
        return filled

    def _attribute(self, call: Call, name: str) -> object:
        """What a call sets an attribute to: itself, by its own caller, or by the function's default."""
        scope, node = call
        value = node.attrs.get(name, self._defaults[id(self._bodies[id(node)])].get(name))
        if not isinstance(value, gs.Node.AttributeRef):
            return value
        values = [self._attribute(outer, value.name) for outer in self.of(_root(scope))]
        same = values and all(repr(v) == repr(values[0]) for v in values)
        return values[0] if same else value

    def _follow(self, scopes: Sequence[Scope], nodes: dict[int, list[gs.Node]]) -> None:
        """Follow the calls from the main graph on."""
        within: dict[int, list[Scope]] = {}
        for scope in scopes:
            within.setdefault(id(_root(scope)), []).append(scope)
        waiting = [s for s in scopes if s.parent is None and not s.is_function]
        while waiting:
            for caller in within[id(waiting.pop())]:
                for node in nodes[id(caller)]:
                    body = self._bodies[id(node)]
                    if id(body) not in self._of:
                        waiting.append(body)
                    self._of.setdefault(id(body), []).append((caller, node))

    def _count(self, root: Scope) -> int:
        """How often it runs, counted to two."""
        if not root.is_function:
            return 1
        if id(root) not in self._runs:
            self._runs[id(root)] = 0
            self._runs[id(root)] = min(2, sum(self._count(_root(scope)) for scope, _ in self.of(root)))
        return self._runs[id(root)]


def _root(scope: Scope) -> Scope:
    while scope.parent is not None:
        scope = scope.parent
    return scope


def _key(function: onnx.FunctionProto) -> tuple[str, str, str]:
    return function.domain, function.name, getattr(function, "overload", "")  # onnx before 1.16 has none


def _defaults(function: onnx.FunctionProto) -> dict[str, object]:
    given = getattr(function, "attribute_proto", ())  # onnx before 1.13 has none
    return {a.name: onnx.helper.get_attribute_value(a) for a in given}


def _called_by(model: Model, node: gs.Node) -> tuple[str, str, str]:
    return domain_of(node), node.op, getattr(model.origin[id(node)], "overload", "")

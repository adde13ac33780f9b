"""The weight side: trace a tensor back to stored values through the operators that exporters put in between.

Only the operators of `FOLLOWED` are followed, and only towards the weight: everything else is an activation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs
from onnx import SparseTensorProto, TensorProto

from nmonnx.errors import InputError
from nmonnx.onnx_file.graph import Model
from nmonnx.sites.calls import Calls
from nmonnx.sites.constant import AT_RUN_TIME, Constant, NotConstant, Stored, stored_constant
from nmonnx.sites.operators import FOLLOWED
from nmonnx.sites.scope import Definition, Formal, Overridable, Scope, domain_of, input_of

LONGEST_CHAIN = 64
"""Operators followed between a product and its weight; exporters write one to four."""


class Tracer:
    """Traces tensors of one model; every tensor is traced once."""

    def __init__(self, model: Model, scopes: list[Scope]) -> None:
        self.model = model
        self._known: dict[tuple[int, str], Constant | NotConstant] = {}
        self._fixed: dict[int, set[str]] = {}
        self.calls = Calls(model, scopes)

    def trace(self, scope: Scope, tensor: gs.Tensor | None, depth: int = 0) -> Constant | NotConstant:
        """The constant behind `tensor` as seen from `scope`."""
        found = scope.find(tensor.name) if tensor is not None else None
        if tensor is None or found is None:
            return NotConstant(AT_RUN_TIME)
        home, definition = found
        key = (id(home), tensor.name)
        if key not in self._known:
            if depth > LONGEST_CHAIN:
                return NotConstant(f"more than {LONGEST_CHAIN} operators lie between it and its stored weight")
            self._known[key] = self._resolve(home, tensor, definition, depth)
        return self._known[key]

    def ints(self, scope: Scope, tensor: gs.Tensor | None) -> list[int] | None:
        """Values of a constant shape, axis or index; None when it is not constant."""
        constant = self.trace(scope, tensor)
        return np.atleast_1d(constant.read()).astype(int).tolist() if isinstance(constant, Constant) else None

    def _resolve(self, scope: Scope, tensor: gs.Tensor, definition: Definition, depth: int) -> Constant | NotConstant:
        if isinstance(definition, Formal):
            return self._argument(scope, tensor, definition.index, depth)
        if isinstance(definition, gs.Node):
            return self._made_by(scope, definition, depth)
        if isinstance(definition, Overridable):
            constant = stored_constant(self.model.tensors, tensor, definition.default)
            reason = f"its weight {tensor.name!r} is also a graph input, so the caller may replace it"
            return replace(constant, blocked=reason)
        return stored_constant(self.model.tensors, tensor, definition)

    def _made_by(self, scope: Scope, node: gs.Node, depth: int) -> Constant | NotConstant:
        operator = FOLLOWED.get(node.op) if domain_of(node) in ("", "com.microsoft") else None
        if has_caller_attributes(node):
            return NotConstant(f"attributes of {node.op} are set by the caller of the function")
        if operator is None:
            if node.outputs[0].name in self._fixed_names(scope):
                return NotConstant(
                    f"its weight is computed by {node.op} from constants; fold the constants first", fixed=True
                )
            return NotConstant(AT_RUN_TIME)
        return operator(self, scope, node, depth + 1)

    def _argument(self, scope: Scope, tensor: gs.Tensor, index: int, depth: int) -> Constant | NotConstant:
        given = [self.trace(caller, input_of(node, index), depth + 1) for caller, node in self.calls.of(scope)]
        constants = [c for c in given if isinstance(c, Constant)]
        if given and all(g == given[0] for g in given) and isinstance(given[0], NotConstant):
            return given[0]
        if not constants or len(constants) < len(given):
            return NotConstant("its weight is an input of the graph or function")
        first = constants[0]
        if any((c.shape, c.elem) != (first.shape, first.elem) for c in constants):
            return NotConstant("calls of its function bring weights of different shapes", fixed=True)
        same = all(c is first or _is_same(c.stored, first.stored) for c in constants)
        return Constant(
            first.shape,
            first.elem,
            first.read if same else _several(tensor.name, scope.graph.name, len(constants)),
            first.name if same else tensor.name,
            Stored(tensor, first.elem, False, None) if not first.quantised else None,
            next((c.indirect for c in constants if c.quantised), ""),
            next((c.blocked for c in constants if c.blocked), ""),
            first.quantised,
        )

    def _fixed_names(self, scope: Scope) -> set[str]:
        """Names of this scope that depend on constants alone."""
        if id(scope) not in self._fixed:
            outer = self._fixed_names(scope.parent) if scope.parent else set()
            self._fixed[id(scope)] = set()
            self._fixed[id(scope)] = outer | _fixed_names(scope, outer)
        return self._fixed[id(scope)]


def has_caller_attributes(node: gs.Node) -> bool:
    """Inside a function body, an attribute may be a reference to an attribute of the call."""
    return any(isinstance(value, gs.Node.AttributeRef) for value in node.attrs.values())


def _is_same(a: Stored | None, b: Stored | None) -> bool:
    return a is not None and b is not None and a.tensor is b.tensor and a.transposed == b.transposed


def _several(name: str, function: str, count: int) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        raise InputError(
            f"weight {name!r} of function {function!r} stands for {count} weights, one a call;"
            " inline the functions first (onnx.inliner.inline_local_functions)"
        )

    return read


def _fixed_names(scope: Scope, outer: set[str]) -> set[str]:
    fixed = {n for n, d in scope.defined.items() if isinstance(d, (TensorProto, SparseTensorProto))}
    waiting: dict[int, int] = {}
    readers: dict[str, list[gs.Node]] = {}
    ready: deque[gs.Node] = deque()
    for node in scope.graph.nodes:
        needed = {t.name for t in node.inputs if t.name} - fixed - outer
        waiting[id(node)] = len(needed)
        for name in needed:
            readers.setdefault(name, []).append(node)
        if not needed:
            ready.append(node)
    while ready:
        node = ready.popleft()
        if not _is_pure(node):
            continue
        for output in node.outputs:
            fixed.add(output.name)
            for reader in readers.get(output.name, ()):
                waiting[id(reader)] -= 1
                if not waiting[id(reader)]:
                    ready.append(reader)
    return fixed


def _is_pure(node: gs.Node) -> bool:
    return (
        domain_of(node) == ""
        and not node.op.startswith("Random")
        and not any(isinstance(value, (gs.Graph, gs.Node.AttributeRef)) for value in node.attrs.values())
    )

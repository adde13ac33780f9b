"""`Scope`: what a tensor name means in one graph, subgraph or function body."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import onnx
import onnx_graphsurgeon as gs
from onnx import SparseTensorProto, TensorProto

from nmonnx.onnx_file.graph import DOMAIN, Model


@dataclass(frozen=True)
class Formal:
    """An input that the caller fills in: of the model, of a loop body, or of a function."""

    index: int


@dataclass(frozen=True)
class Overridable:
    """An initializer that is also a graph input: the caller may replace it (IR version 4 and above)."""

    default: TensorProto | SparseTensorProto


Definition: TypeAlias = gs.Node | TensorProto | SparseTensorProto | Formal | Overridable


class Use(NamedTuple):
    node: gs.Node
    port: int


@dataclass(eq=False)
class Scope:
    """path as in `Model.scopes`; `parent` is the graph around a subgraph, None for functions and the main graph."""

    path: str
    graph: gs.Graph
    parent: Scope | None
    defined: dict[str, Definition]
    outputs: frozenset[str]
    uses: dict[str, list[Use]] = field(default_factory=dict)

    @property
    def is_function(self) -> bool:
        """A function body stands for all its calls."""
        return isinstance(self.graph, gs.Function)

    def find(self, name: str) -> tuple[Scope, Definition] | None:
        """The innermost definition of `name` seen from here, with the scope that holds it."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.defined:
                return scope, scope.defined[name]
            scope = scope.parent
        return None

    def producer(self, tensor: gs.Tensor) -> tuple[Scope, gs.Node] | None:
        """The node that makes `tensor`, with the scope that holds it."""
        found = self.find(tensor.name)
        return (found[0], found[1]) if found and isinstance(found[1], gs.Node) else None

    def uses_of(self, name: str) -> list[Use]:
        """Every input that reads a tensor defined in this scope, those inside subgraphs too."""
        return self.uses.get(name, [])


def read_scopes(model: Model) -> list[Scope]:
    """The scopes of a model, outer before inner; bodies of nmonnx's own functions are left out."""
    scopes: list[Scope] = []
    protos: dict[int, Any] = {id(model.graph): model.proto.graph}
    parents: dict[int, Scope] = {}
    own: set[int] = set()
    for function, proto in zip(model.graph.functions, model.proto.functions, strict=True):
        protos[id(function)] = proto
        own |= {id(function)} if function.domain == DOMAIN else set()
    for path, graph in model.scopes():
        if id(graph) in own or id(graph) not in protos:
            continue
        scope = _scope(path, graph, protos[id(graph)], parents.get(id(graph)), model.proto.ir_version)
        scopes.append(scope)
        for subgraph, body in _bodies(model, graph):
            parents[id(subgraph)], protos[id(subgraph)] = scope, body
    for scope in scopes:
        _add_uses(scope)
    return scopes


def domain_of(node: gs.Node) -> str:
    """ "" and "ai.onnx" name the same operator set."""
    return "" if node.domain in (None, "", "ai.onnx") else node.domain


def input_of(node: gs.Node, index: int) -> gs.Tensor | None:
    """Input `index`, None when it is left out."""
    tensor = node.inputs[index] if index < len(node.inputs) else None
    return tensor if tensor is not None and tensor.name else None


def _scope(path: str, graph: gs.Graph, proto: Any, parent: Scope | None, ir_version: int) -> Scope:
    is_function = isinstance(proto, onnx.FunctionProto)
    inputs = list(proto.input) if is_function else [i.name for i in proto.input]
    outputs = proto.output if is_function else [o.name for o in proto.output]
    defined: dict[str, Definition] = {name: Formal(i) for i, name in enumerate(inputs)}
    if not is_function:
        for tensor in proto.initializer:
            defined[tensor.name] = _stored(tensor, tensor.name, defined, ir_version)
        for sparse in proto.sparse_initializer:
            defined[sparse.values.name] = _stored(sparse, sparse.values.name, defined, ir_version)
    for node in graph.nodes:
        defined.update((output.name, node) for output in node.outputs if output.name)
    return Scope(path, graph, parent, defined, frozenset(outputs))


def _stored(
    tensor: TensorProto | SparseTensorProto, name: str, defined: dict[str, Definition], ir_version: int
) -> Definition:
    return Overridable(tensor) if name in defined and ir_version >= 4 else tensor


def _bodies(model: Model, graph: gs.Graph) -> Iterator[tuple[gs.Graph, onnx.GraphProto]]:
    for node in graph.nodes:
        if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
            for attribute in model.origin[id(node)].attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    yield node.attrs[attribute.name], attribute.g


def _add_uses(scope: Scope) -> None:
    for node in scope.graph.nodes:
        for index, tensor in enumerate(node.inputs):
            found = scope.find(tensor.name) if tensor.name else None
            if found:
                found[0].uses.setdefault(tensor.name, []).append(Use(node, index))

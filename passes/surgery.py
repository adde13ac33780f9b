"""What every pass needs to edit a graph: unique names, the origin of new nodes, removal of what became dead."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import onnx_graphsurgeon as gs
from onnx import numpy_helper

from nmonnx.digest import array_sha256
from nmonnx.onnx_file.graph import DOMAIN, Model
from nmonnx.passes.bodies import INPUTS, NEEDED
from nmonnx.sites import Site


class Names:
    """Names that no scope of the model uses yet."""

    def __init__(self, model: Model) -> None:
        self._nodes: set[str] = set()
        self._tensors: set[str] = {*model.constants, *model.repacked, *model.computed}
        for _, graph in model.scopes():
            self._nodes.update(node.name for node in graph.nodes)
            self._tensors.update(graph.tensors())
            self._tensors.update(t.name for t in (*graph.inputs, *graph.outputs))

    def fresh_node(self, wanted: str) -> str:
        return _fresh(wanted, self._nodes)

    def fresh_tensor(self, wanted: str) -> str:
        return _fresh(wanted, self._tensors)


class Constants:
    """New constants: initializers, or inside functions, which have none, Constant nodes."""

    def __init__(self, model: Model, names: Names) -> None:
        self._model, self._names = model, names

    def add(self, scope: str, wanted: str, values: np.ndarray) -> gs.Tensor:
        """A tensor that every node of the scope at path `scope` can read."""
        tensor = gs.Variable(self._names.fresh_tensor(wanted))
        function = function_of(scope)
        if function:
            body = next(graph for path, graph in self._model.scopes() if path == function)
            body.nodes.append(gs.Node("Constant", attrs={"value": numpy_helper.from_array(values)}, outputs=[tensor]))
        else:
            self._model.constants[tensor.name] = values
        return tensor

    def declare(self, scope: str, wanted: str, slot: str, values: np.ndarray, instead_of: str = "") -> gs.Tensor:
        """The same for a constant that does something: input `slot` of an op, where the original has the tensor
        `instead_of` ("": nothing). The file will say so."""
        tensor = self.add(scope, wanted, values)
        self._model.declared[tensor.name] = {"input": slot, "sha256": array_sha256(values), "from": instead_of}
        return tensor


def brought_by(node: gs.Node) -> list[str]:
    """Names of the optional inputs that a custom op has."""
    pairs = zip(INPUTS.get(node.op, ()), node.inputs, strict=False)
    return [name for name, tensor in pairs if name not in NEEDED and tensor.name]


def function_of(scope: str) -> str:
    """Path of the function that a scope lies in, "" outside of functions."""
    return scope.partition("/")[0] if scope.startswith("function:") else ""


def note(model: Model, node: gs.Node, made_by: str, sites: Sequence[Site]) -> None:
    """Record on a new node which pass made it, for which sites."""
    model.notes[id(node)] = {"nmonnx.pass": made_by, "nmonnx.site": json.dumps([site.name for site in sites])}
    model.alive.append(node)


def nodes_of_sites(model: Model) -> Iterator[tuple[str, gs.Node]]:
    """Each pruned site with the op that serves it."""
    for _, graph in model.scopes():
        for node in graph.nodes:
            if node.domain == DOMAIN and id(node) in model.notes:
                for site in json.loads(model.notes[id(node)]["nmonnx.site"]):
                    yield site, node


def no_longer_serves(model: Model, node: gs.Node, site: Site) -> None:
    """Take a site off the record of a node that served it together with others."""
    props = model.notes[id(node)]
    props["nmonnx.site"] = json.dumps([name for name in json.loads(props["nmonnx.site"]) if name != site.name])


def remove_dead(model: Model, nodes: Iterable[gs.Node]) -> None:
    """Remove those of `nodes` whose results nothing reads any more, then what fed only them. Linear in the model."""
    scopes = [graph for _, graph in model.scopes()]
    outputs = {id(t) for graph in scopes for t in graph.outputs}
    dead: set[int] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if id(node) in dead or any(t.outputs or id(t) in outputs for t in node.outputs):
            continue
        dead.add(id(node))
        stack.extend(producer for t in node.inputs for producer in t.inputs)
        node.inputs.clear()
        node.outputs.clear()
    for graph in scopes:
        if any(id(node) in dead for node in graph.nodes):
            graph.nodes[:] = [node for node in graph.nodes if id(node) not in dead]


def drop_unread(model: Model) -> None:
    """Forget the weights that were to be made when the model is saved and that nothing reads any more."""
    read = set(read_names(model))
    for later in (model.repacked, model.computed):
        for name in [name for name in later if name not in read]:
            del later[name]


def read_names(model: Model) -> Iterator[str]:
    """Tensors that the nodes and the outputs of every scope read."""
    for _, graph in model.scopes():
        yield from (tensor.name for node in graph.nodes for tensor in node.inputs)
        yield from (tensor.name for tensor in graph.outputs)


def _fresh(wanted: str, taken: set[str]) -> str:
    name, count = wanted, 1
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    taken.add(name)
    return name

"""What every pass needs to edit a graph: unique names, the origin of new nodes, removal of what became dead."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import onnx_graphsurgeon as gs

from nmonnx.graph import Model
from nmonnx.sites import Site


class Names:
    """Names that no scope of the model uses yet."""

    def __init__(self, model: Model) -> None:
        self._nodes: set[str] = set()
        self._tensors: set[str] = {*model.constants, *model.repacked}
        for _, graph in model.scopes():
            self._nodes.update(node.name for node in graph.nodes)
            self._tensors.update(graph.tensors())
            self._tensors.update(t.name for t in (*graph.inputs, *graph.outputs))

    def fresh_node(self, wanted: str) -> str:
        return _fresh(wanted, self._nodes)

    def fresh_tensor(self, wanted: str) -> str:
        return _fresh(wanted, self._tensors)


def note(model: Model, node: gs.Node, made_by: str, sites: Sequence[Site]) -> None:
    """Record on a new node which pass made it, for which sites."""
    model.notes[id(node)] = {"nmonnx.pass": made_by, "nmonnx.site": json.dumps([site.name for site in sites])}


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


def _fresh(wanted: str, taken: set[str]) -> str:
    name, count = wanted, 1
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    taken.add(name)
    return name

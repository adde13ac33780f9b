"""Put pruned weights in the place of the weights of the chosen layers: a baseline, activations stay dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from nmonnx.onnx_file.graph import Model
from nmonnx.onnx_file.weight_pruning import PrunedWeight
from nmonnx.passes.result import PassResult
from nmonnx.passes.surgery import Names
from nmonnx.pruning.treatment import Treatment
from nmonnx.sites import Site


@dataclass(frozen=True)
class PruneWeights:
    """Give each chosen layer a new weight without the values that its pattern drops (WT, arXiv 2509.22166).

    1. Every other reader of the weight, such as an embedding that is tied to it, keeps the one that it has.
    2. A layer whose weight is no stored float matrix of the main graph, or comes through a node that others read too,
       is left alone.
    """

    treatments: Mapping[str, Treatment]
    name: str = "prune-weights"

    def apply(self, model: Model, sites: Sequence[Site]) -> PassResult:
        names, left, made = Names(model), {}, 0
        stored = {t.name for t in model.proto.graph.initializer} - {i.name for i in model.proto.graph.input}
        for site in sites:
            weight = site.fusable
            reader = _reader(site)
            if weight is None or weight.proto is None or weight.proto.name not in stored:
                quantised = "its weight is quantised" if site.quantised else ""
                left[site.name] = site.not_fusable or quantised or "its weight is no initializer of the main graph"
            elif reader is None:
                left[site.name] = "its weight comes through a node that other layers read too"
            else:
                node, index = reader
                name = names.fresh_tensor(f"{site.name}/weight_pruned")
                pattern = self.treatments[site.name].pattern
                model.repacked[name] = PrunedWeight(name, weight.proto, pattern, int(weight.transposed))
                node.inputs[index] = gs.Variable(name)
                made += 1
        return PassResult(self.name, made, left)


def _reader(site: Site) -> tuple[gs.Node, int] | None:
    """The node that reads the stored weight for this layer alone, and which of its inputs that is."""
    if site.fusable is None:
        return None
    node = site.node
    while True:
        index = next((i for i, t in enumerate(node.inputs) if t.name == site.fusable.tensor.name), None)
        if index is not None:
            return node, index
        feeders = node.inputs[1].inputs if node is site.node and len(node.inputs) > 1 else node.inputs[0].inputs
        if not feeders or len(feeders[0].outputs[0].outputs) != 1:
            return None
        node = feeders[0]

"""Insert `NMPrune` in front of the chosen linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from nmonnx.graph import DOMAIN, Model
from nmonnx.passes.result import PassResult
from nmonnx.passes.surgery import Names, note
from nmonnx.pattern import Pattern
from nmonnx.sites import Site


@dataclass(frozen=True)
class InsertPrune:
    """Put an `NMPrune` between each chosen linear layer and its input activation.

    1. Layers that read the same activation in the same graph (q, k and v; gate and up) share one prune.
    2. Every other reader of the activation, graph outputs included, keeps the dense tensor under its own name.
    3. Behind a quantiser the prune goes in front of the quantiser, on the float values.
    4. A layer whose input is pruned already is left alone.
    """

    pattern: Pattern
    name: str = "insert-prune"

    def apply(self, model: Model, sites: Sequence[Site]) -> PassResult:
        names = Names(model)
        groups: dict[tuple[int, int], list[Site]] = {}
        left = {}
        for site in sites:
            if any(producer.op in ("NMPrune", "NMMatMul") for producer in site.activation.inputs):
                left[site.name] = "its input is pruned already"
            else:
                groups.setdefault((id(site.splice_graph), id(site.activation)), []).append(site)
        for group in groups.values():
            self._insert(model, names, group)
        return PassResult(self.name, len(groups), left)

    def _insert(self, model: Model, names: Names, sites: list[Site]) -> None:
        activation = sites[0].activation
        pruned = gs.Variable(names.fresh_tensor(f"{activation.name}/pruned"))
        prune = gs.Node(
            "NMPrune",
            names.fresh_node(f"{activation.name}/NMPrune"),
            {"keep": self.pattern.n, "group": self.pattern.m},
            [activation],
            [pruned],
            domain=DOMAIN,
        )
        sites[0].splice_graph.nodes.append(prune)
        note(model, prune, self.name, sites)
        for site in sites:
            for consumer, index in site.splice:
                consumer.inputs[index] = pruned

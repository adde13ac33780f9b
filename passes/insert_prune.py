"""Insert `NMPrune` in front of the chosen linear layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from nmonnx.onnx_file.graph import DOMAIN, Model
from nmonnx.passes.bodies import CENTER_VALUES, CRITERION, FUSED
from nmonnx.passes.result import PassResult
from nmonnx.passes.surgery import Constants, Names, note
from nmonnx.pruning.treatment import Treatment
from nmonnx.sites import Site


@dataclass(frozen=True)
class InsertPrune:
    """Put an `NMPrune` between each chosen linear layer and its input activation.

    1. Layers that read the same activation in the same graph (q, k and v; gate and up) share one prune, if they share
       their treatment.
    2. Every other reader of the activation, graph outputs included, keeps the dense tensor under its own name.
    3. Behind a quantiser the prune goes in front of the quantiser, on the float values.
    4. A layer whose input is pruned already is left alone.
    5. The constants of the treatment become inputs of the op, and are declared in `Model.declared`.
    """

    treatments: Mapping[str, Treatment]
    name: str = "insert-prune"

    def apply(self, model: Model, sites: Sequence[Site]) -> PassResult:
        names = Names(model)
        constants = Constants(model, names)
        groups: dict[tuple[int, int, int], list[Site]] = {}
        left = {}
        for site in sites:
            if any(producer.op in ("NMPrune", *FUSED) for producer in site.activation.inputs):
                left[site.name] = "its input is pruned already"
            else:
                treatment = id(self.treatments[site.name])
                groups.setdefault((id(site.splice_graph), id(site.activation), treatment), []).append(site)
        for group in groups.values():
            self._insert(model, names, constants, group)
        return PassResult(self.name, len(groups), left)

    def _insert(self, model: Model, names: Names, constants: Constants, sites: list[Site]) -> None:
        activation, treatment = sites[0].activation, self.treatments[sites[0].name]
        pruned = gs.Variable(names.fresh_tensor(f"{activation.name}/pruned"))
        prune = gs.Node(
            "NMPrune",
            names.fresh_node(f"{activation.name}/NMPrune"),
            _attributes(treatment),
            [activation, *_inputs(constants, sites[0], treatment)],
            [pruned],
            domain=DOMAIN,
        )
        sites[0].splice_graph.nodes.append(prune)
        note(model, prune, self.name, sites)
        for site in sites:
            for consumer, index in site.splice:
                consumer.inputs[index] = pruned


def _attributes(treatment: Treatment) -> dict[str, int]:
    asked = {"variance": int(treatment.variance), "center": CENTER_VALUES[treatment.center]}
    pattern = {"keep": treatment.pattern.n, "group": treatment.pattern.m}
    return pattern | {name: value for name, value in asked.items() if value}


def _inputs(constants: Constants, site: Site, treatment: Treatment) -> list[gs.Tensor]:
    """The inputs of the op behind its activation, up to the last that is given."""
    given = treatment.constants()
    last = max((CRITERION.index(slot) for slot in given), default=-1)
    return [
        constants.declare(site.scope, f"{site.name}/{slot}", slot, given[slot])
        if slot in given
        else gs.Variable.empty()
        for slot in CRITERION[: last + 1]
    ]

"""Put an op of stock operators in front of the chosen linear layers, where the pruning has no kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx.parser
import onnx_graphsurgeon as gs

from nmonnx.errors import UsageError
from nmonnx.onnx_file.graph import DOMAIN, Model
from nmonnx.passes.bodies import CENTER_VALUES
from nmonnx.passes.emit_functions import claims_sizes
from nmonnx.passes.emulated_bodies import OLDEST_OPSET, emulated_function
from nmonnx.passes.result import PassResult
from nmonnx.passes.surgery import Constants, Names, note
from nmonnx.pruning.emulated import OPS
from nmonnx.pruning.treatment import Treatment
from nmonnx.sites import Site


@dataclass(frozen=True)
class EmulatePrune:
    """Put `op`, one of `nmonnx.pruning.emulated.OPS`, between each chosen linear layer and its input activation.

    1. Layers that read the same activation in the same graph share one, if they share their treatment.
    2. The op is a model-local function of stock operators: it runs with and without the library, and saves nothing.
    3. A layer whose input is pruned already is left alone.
    4. What value_info says of the sizes of an activation is dropped, as for `EmitFunctions`.
    5. Raises UsageError below opset 15, which cannot express it.
    """

    op: str
    treatments: Mapping[str, Treatment]
    name: str = "emulate-prune"

    def apply(self, model: Model, sites: Sequence[Site]) -> PassResult:
        if model.opset < OLDEST_OPSET:
            raise UsageError(
                f"opset {model.opset} cannot express {self.op} in stock operators; export with opset {OLDEST_OPSET}"
            )
        names = Names(model)
        constants = Constants(model, names)
        groups: dict[tuple[int, int, int], list[Site]] = {}
        left = {}
        for site in sites:
            if any(producer.domain == DOMAIN for producer in site.activation.inputs):
                left[site.name] = "its input is pruned already"
            else:
                treatment = id(self.treatments[site.name])
                groups.setdefault((id(site.splice_graph), id(site.activation), treatment), []).append(site)
        for group in groups.values():
            self._insert(model, names, constants, group)
        if groups:
            model.shapeless.update(site.activation.name for site in sites if claims_sizes(site))
            model.functions.append(onnx.parser.parse_function(emulated_function(self.op, model.opset, *self._extras)))
        return PassResult(self.name, len(groups), left)

    @property
    def _extras(self) -> tuple[bool, bool, bool]:
        """Whether any layer has a shift, a variance or a center to correct: then each has that input or attribute."""
        some = list(self.treatments.values())
        return any(t.shift is not None for t in some), any(t.variance for t in some), any(t.center for t in some)

    def _insert(self, model: Model, names: Names, constants: Constants, sites: list[Site]) -> None:
        site, activation, treatment = sites[0], sites[0].activation, self.treatments[sites[0].name]
        pruned = gs.Variable(names.fresh_tensor(f"{activation.name}/pruned"))
        shift, variance, center = self._extras
        given = {"scale": np.ones(1, np.float32), "shift": np.zeros(1, np.float32), **treatment.constants()}
        slots = [*OPS[self.op].inputs[1:], *(["shift"] if shift else [])]
        options = [constants.declare(site.scope, f"{site.name}/{slot}", slot, given[slot]) for slot in slots]
        asked = {"keep": treatment.pattern.n, "group": treatment.pattern.m}
        asked |= {"variance": int(treatment.variance)} if variance else {}
        asked |= {"center": CENTER_VALUES[treatment.center]} if center else {}
        node = gs.Node(
            self.op,
            names.fresh_node(f"{activation.name}/{self.op}"),
            asked,
            [activation, *options],
            [pruned, *([gs.Variable(names.fresh_tensor(f"{activation.name}/center"))] if center else [])],
            domain=DOMAIN,
        )
        site.splice_graph.nodes.append(node)
        note(model, node, self.name, sites)
        for other in sites:
            for consumer, index in other.splice:
                consumer.inputs[index] = pruned

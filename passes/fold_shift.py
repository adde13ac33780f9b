"""Make up behind the layer for what a shift takes from the activation: y = P(x - shift) W + (b + shift W)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper, numpy_helper

from nmonnx.digest import array_sha256
from nmonnx.errors import InputError
from nmonnx.onnx_file.graph import Model
from nmonnx.passes.behind import Edit, add_behind, end_of, product_with, settle
from nmonnx.passes.bodies import FUSED, INPUTS
from nmonnx.passes.result import PassResult
from nmonnx.passes.surgery import Constants, Names, brought_by, nodes_of_sites, remove_dead
from nmonnx.pruning.emulated import OPS
from nmonnx.sites import Site


@dataclass(frozen=True)
class FoldShift:
    """Give every layer whose prune has a shift what makes up for it (S-PTS, arXiv 2509.22166).

    1. A fused op gets the bias b + shift W, a prune-only layer an Add of the constant shift W behind it. It is
       summed in float64 and rounded once to the type of the activation; a new constant, so that a bias or a weight with
       other readers stays what it is.
    2. A prune loses its shift, and its layers are told with the reason, where that cannot be exact: for a bias that is
       computed, a weight that has no single value, a product inside a bigger node, an activation that is quantised
       with a fixed range.
    """

    name: str = "fold-shift"

    def apply(self, model: Model, sites: Sequence[Site]) -> PassResult:
        names = Names(model)
        constants = Constants(model, names)

        def plan(site: Site, node: gs.Node) -> Edit | str:
            return self._plan(model, names, constants, site, node)

        open_ = [site for site in sites if site.name not in model.settled]
        return PassResult(
            self.name, *settle(model, open_, lambda node: "shift" in brought_by(node), plan, partial(_drop, model))
        )

    def refusals(self, model: Model, sites: Sequence[Site]) -> dict[str, str]:
        """Site name -> the reason, for those that would lose their shift."""
        names = Names(model)
        constants, nodes = Constants(model, names), dict(nodes_of_sites(model))
        served = {site.name: (site, nodes[site.name]) for site in sites if site.name in nodes}
        plans = {
            name: self._plan(model, names, constants, site, node)
            for name, (site, node) in served.items()
            if "shift" in brought_by(node)
        }
        alone = {name: plan for name, plan in plans.items() if isinstance(plan, str)}
        because = {id(served[name][1]): (name, reason) for name, reason in alone.items()}
        return {
            name: alone.get(name, "its prune serves {!r} too: {}".format(*because[id(served[name][1])]))
            for name in plans
            if id(served[name][1]) in because
        }

    def _plan(self, model: Model, names: Names, constants: Constants, site: Site, node: gs.Node) -> Edit | str:
        fused = node.op in FUSED
        end = node if fused else end_of(site)
        old = node.inputs[INPUTS[node.op].index("bias")].name if fused else ""
        own = _values(model, old) if old else np.zeros(1)
        if isinstance(end, str):
            return end
        if own is None:
            return f"its bias {old!r} is no constant that can be read"
        try:
            made = product_with(model, site, shift_of(model, node))
        except InputError as e:
            return str(e)
        if isinstance(made, str):
            return made
        values = (own.reshape(-1) + made).astype(helper.tensor_dtype_to_np_dtype(site.elem))
        if not np.isfinite(values).all():
            return "what makes up for the shift is out of the range of its type"
        return partial(self._put, model, names, constants, site, node if fused else None, values, old)

    def _put(
        self,
        model: Model,
        names: Names,
        constants: Constants,
        site: Site,
        fused: gs.Node | None,
        values: np.ndarray,
        old: str,
    ) -> None:
        if fused is not None:
            place = INPUTS[fused.op].index("bias")
            fused.inputs[place] = constants.declare(site.scope, f"{site.name}/bias", "bias", values, old)
        else:
            addend = constants.declare(site.scope, f"{site.name}/added", "added", values)
            add_behind(model, names, site, self.name, addend)


def _drop(model: Model, node: gs.Node) -> None:
    place = INPUTS[node.op].index("shift")
    shift = node.inputs[place]
    if node.op in OPS:  # whose function takes it for granted
        none = np.zeros_like(shift_of(model, node))
        model.declared[shift.name]["sha256"] = array_sha256(none)
        if shift.name in model.constants:
            model.constants[shift.name] = none
        else:
            shift.inputs[0].attrs["value"] = numpy_helper.from_array(none)
        return
    node.inputs[place] = gs.Variable.empty()
    while not node.inputs[-1].name:
        node.inputs.pop()
    if not shift.outputs:
        del model.declared[shift.name]
        remove_dead(model, shift.inputs)  # in a function, where it is a node


def shift_of(model: Model, node: gs.Node) -> np.ndarray:
    """The values that `InsertPrune` gave, an initializer or, in a function, a Constant."""
    tensor = node.inputs[INPUTS[node.op].index("shift")]
    if tensor.name in model.constants:
        return model.constants[tensor.name]
    return numpy_helper.to_array(tensor.inputs[0].attrs["value"])


def _values(model: Model, name: str) -> np.ndarray | None:
    stored = next((t for t in model.proto.graph.initializer if t.name == name), None)
    if stored is None or name in {i.name for i in model.proto.graph.input}:
        return None
    return model.tensors.array(stored).astype(np.float64)

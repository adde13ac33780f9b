"""Fold what a shift takes from the activation into the bias of the layer: y = P(x - shift) W + (b + shift W)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper

from nmonnx.errors import InputError
from nmonnx.graph import Model
from nmonnx.passes.bodies import INPUTS
from nmonnx.passes.result import PassResult
from nmonnx.passes.surgery import Constants, Names, brought_by, nodes_of_sites
from nmonnx.sites import Site


@dataclass(frozen=True)
class FoldShift:
    """Give every `NMMatMul` with a shift the bias that makes up for it (S-PTS, arXiv 2509.22166).

    1. bias' = bias + shift W, summed in float64 and rounded once to the type of the activation; a new constant, so
       that a bias or a weight with other readers stays what it is.
    2. A layer that is not fused has no bias input: its prune loses the shift, and it is told with the reason. The same
       for a bias that is computed, and for a weight that has no single value.
    """

    name: str = "fold-shift"

    def apply(self, model: Model, sites: Sequence[Site]) -> PassResult:
        constants, left, folded = Constants(model, Names(model)), {}, 0
        nodes = dict(nodes_of_sites(model))
        unfolded: dict[int, gs.Node] = {}  # a prune may serve several sites
        for site in sites:
            node = nodes.get(site.name)
            if node is None or "shift" not in brought_by(node):
                continue
            reason = self._fold(model, constants, site, node)
            if reason:
                left[site.name] = reason
                unfolded[id(node)] = node
            else:
                folded += 1
        for node in unfolded.values():
            _drop(node)
        return PassResult(self.name, folded, left)

    def _fold(self, model: Model, constants: Constants, site: Site, node: gs.Node) -> str:
        if node.op != "NMMatMul":
            return "it is prune-only and has no bias to fold a shift into"
        place = INPUTS[node.op].index("bias")
        old = node.inputs[place]
        bias = _values(model, old) if old.name else np.zeros(1)
        if bias is None:
            return f"its bias {old.name!r} is no constant that can be read"
        try:
            weight = site.weight()
        except InputError as e:
            return str(e)
        shift = model.constants[node.inputs[INPUTS[node.op].index("shift")].name].astype(np.float64)
        made = bias.reshape(-1).astype(np.float64) + np.broadcast_to(shift, site.k) @ weight.astype(np.float64)
        values = made.astype(helper.tensor_dtype_to_np_dtype(site.elem))
        node.inputs[place] = constants.declare(site.scope, f"{site.name}/bias", "bias", values, old.name)
        return ""


def _drop(node: gs.Node) -> None:
    node.inputs[INPUTS[node.op].index("shift")] = gs.Variable.empty()
    while not node.inputs[-1].name:
        node.inputs.pop()


def _values(model: Model, tensor: gs.Tensor) -> np.ndarray | None:
    stored = next((t for t in model.proto.graph.initializer if t.name == tensor.name), None)
    if stored is None or tensor.name in {i.name for i in model.proto.graph.input}:
        return None
    return model.tensors.array(stored)

"""Make up for what centring takes from each token: y = P(x - eta) W + eta r + b, r what the rows of W add up to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from nmonnx.errors import InputError
from nmonnx.onnx_file.graph import Model
from nmonnx.passes.behind import Edit, add_behind, end_of, product_with, settle
from nmonnx.passes.bodies import FUSED, INPUTS
from nmonnx.passes.result import PassResult
from nmonnx.passes.surgery import Constants, Names, function_of
from nmonnx.pruning.emulated import OPS
from nmonnx.sites import Site


@dataclass(frozen=True)
class FoldCenter:
    """Give every layer whose prune has a center what makes up for it (D-PTS, arXiv 2509.22166).

    1. A fused op gets `row_sum` = r, summed in float64 and rounded to float32. Behind a prune-only layer stock ops add
       eta r, eta being the second output of the prune; never is a dense activation made again.
    2. A prune loses its center, and its layers are told with the reason, where that cannot be exact: see `FoldShift`.
    """

    name: str = "fold-center"

    def apply(self, model: Model, sites: Sequence[Site]) -> PassResult:
        names = Names(model)
        constants = Constants(model, names)
        paths = {id(graph): path for path, graph in model.scopes()}

        def plan(site: Site, node: gs.Node) -> Edit | str:
            if node.op not in FUSED:
                end = _end_of(site, paths[id(site.splice_graph)])
                if isinstance(end, str):
                    return end
            try:
                made = product_with(model, site, np.ones(1))
            except InputError as e:
                return str(e)
            if isinstance(made, str):
                return made
            values = made.astype(np.float64 if site.elem == TensorProto.DOUBLE else np.float32)
            if not np.isfinite(values).all():
                return "what the rows of its weight add up to is out of the range of float32"
            return partial(self._put, model, names, constants, site, node, values)

        return PassResult(self.name, *settle(model, sites, lambda node: bool(node.attrs.get("center")), plan, _drop))

    def _put(
        self, model: Model, names: Names, constants: Constants, site: Site, node: gs.Node, values: np.ndarray
    ) -> None:
        row_sum = constants.declare(site.scope, f"{site.name}/row_sum", "row_sum", values)
        if node.op in FUSED:
            missing = INPUTS[node.op].index("row_sum") - len(node.inputs)
            node.inputs += [*(gs.Variable.empty() for _ in range(missing)), row_sum]
            return
        if len(node.outputs) < 2:
            node.outputs.append(gs.Variable(names.fresh_tensor(f"{node.name}/center")))
        add_behind(model, names, site, self.name, row_sum, node.outputs[1])


def _end_of(site: Site, splice_path: str) -> gs.Node | str:
    if not (site.scope == splice_path or site.scope.startswith(f"{splice_path}/".lstrip("/"))):
        return "its activation is pruned in another graph, whose tensors it does not see"
    if function_of(site.scope) != function_of(splice_path):
        return "its activation is pruned outside of its function"
    if site.n == 1 and site.kernel == "NMPrune":
        return "its weight may be a vector, whose product has no axis for the channels"
    return end_of(site)


def _drop(node: gs.Node) -> None:
    if node.op in OPS:  # whose function takes it for granted
        node.attrs["center"] = 0
    else:
        del node.attrs["center"]

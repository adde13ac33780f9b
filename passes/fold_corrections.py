"""Fold what fitting found into constants: y = nu P(x - shift) W' + b', with W' = (weight - A B) diag(scale)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from nmonnx.digest import array_sha256
from nmonnx.errors import InputError
from nmonnx.nbits import in_form
from nmonnx.onnx_file.graph import Computed, Model
from nmonnx.onnx_file.tensors import byte_size
from nmonnx.passes.behind import add_behind, end_of, low_rank
from nmonnx.passes.bodies import FUSED, INPUTS
from nmonnx.passes.fold_shift import FoldShift, shift_of
from nmonnx.passes.quantise_weights import would_be_stored_twice
from nmonnx.passes.result import PassResult
from nmonnx.passes.surgery import (
    Constants,
    Names,
    brought_by,
    drop_unread,
    function_of,
    nodes_of_sites,
    read_names,
    remove_dead,
)
from nmonnx.passes.weight_place import Place, embedded_weights, weight_place
from nmonnx.pruning.folding import added_bias, check_shapes, folded_weight, in_type
from nmonnx.records.corrections import Correction, Corrections
from nmonnx.sites import Site


@dataclass(frozen=True)
class FoldCorrections:
    """Give every corrected layer its new weight and bias.

    1. They are new constants: a weight or a bias with other readers stays what it is, and its bytes are told.
    2. W' is made when it is written, one layer at a time, in the type of the stored weight.
    3. b' = b + bias + shift W' goes to the bias input of `NMMatMul` or the constant C of a Gemm, elsewhere to an Add
       behind the layer. `low` becomes x A B, added behind the layer.
    4. Of MatMulNBits a scale goes into the scales of its groups; a new weight would have to be quantised anew.
    5. A shift that `FoldShift` would have to drop, for another layer behind the prune, is left to it.
    6. Where `QuantiseWeights` will store W' as `weights`, b' is of what that will be.
    7. What cannot be folded whole is left alone with the reason: `weight_place` says which weights. So is what the fit
       refused. Its prune keeps the shift that was fitted, which `FoldShift` makes up for.
    """

    corrections: Corrections | None = None
    weights: str = "keep"
    name: str = "fold-corrections"

    def apply(self, model: Model, sites: Sequence[Site]) -> PassResult:
        if self.corrections is None or "nmonnx.fit" in model.metadata:
            return PassResult(self.name)
        fold, left, done = _Fold(model, self.name, sites, self.weights), {}, {}
        for site in sites:
            if site.name in self.corrections.refused:
                left[site.name] = self.corrections.refused[site.name]
            elif self.corrections.prunes and site.name not in self.corrections.prunes and site.name in fold.nodes:
                left[site.name] = "it was no part of the fit"
            if site.name not in self.corrections.sites:
                continue
            reason = fold.site(site, self.corrections)
            if reason:
                left[site.name] = reason
            else:
                done[site.name] = sorted(self.corrections.sites[site.name].arrays())
        model.metadata["nmonnx.fit"] = json.dumps({"protocol": self.corrections.protocol, "sites": done})
        return PassResult(self.name, len(done), left, fold.extra_bytes())


class _Fold:
    def __init__(self, model: Model, made_by: str, sites: Sequence[Site], weights: str) -> None:
        self.model, self.made_by, self.weights = model, made_by, weights
        self.names = Names(model)
        self.constants = Constants(model, self.names)
        self.nodes = dict(nodes_of_sites(model))
        self.embedded = embedded_weights(model)
        self.stored = {t.name: t for t in model.proto.graph.initializer}
        self.before = set(model.constants)
        self.shiftless = FoldShift().refusals(model, sites)

    def site(self, site: Site, corrections: Corrections) -> str:
        """Fold the correction of one layer; why not, when it cannot be."""
        op = self.nodes.get(site.name)
        if op is None:
            return "it is not pruned"
        node = op if op.op in FUSED else site.node
        correction = corrections.sites[site.name]
        if site.name in self.shiftless:
            return f"its shift cannot be made up for: {self.shiftless[site.name]}"
        shift = self._shift(op)
        if correction.shift is not None and (shift is None or not np.array_equal(correction.shift, shift)):
            return "its prune serves layers of another shift too"
        if site.alpha != 1:
            return f"alpha is {site.alpha:g}, not 1"
        check_shapes(correction, site)
        place = self._weight_place(site, node, correction)
        if isinstance(place, str):
            return place
        try:
            axes = site.weight().ndim
            if axes != 2:
                return f"its weight has {axes} axes, not 2"
            bias = added_bias(correction, site, shift, self._will_be(site, node))
        except InputError as e:
            return str(e)
        if not np.isfinite(bias.astype(helper.tensor_dtype_to_np_dtype(site.elem))).all():
            return "its new bias is out of the range of its type"
        into = self._bias_place(site, node)
        end = node if op.op in FUSED else end_of(site)
        if isinstance(into, str):
            return into
        if isinstance(end, str) and (correction.low is not None or (bias.any() and into is None)):
            return end
        if correction.low is not None and function_of(site.scope):
            return "it lies in a function, where no low rank is added; inline the functions first"
        if place is not None:
            self._put_weight(site, place, corrections)
        elif correction.scale is not None:
            self._put_scales(site, node, correction.scale)
        if bias.any() and into is not None:
            self._put_bias(site, node, bias, into)
        elif bias.any():
            values = in_type(bias, site.elem)
            end = self._add(site, end, self.constants.declare(site.scope, f"{site.name}/added", "added", values))
        if correction.low is not None:
            a, b = (in_type(part, site.elem) for part in correction.low)
            self._add(site, end, low_rank(self.model, self.names, self.constants, site, self.made_by, (a, b)))
        self.model.settled.add(site.name)
        return ""

    def _will_be(self, site: Site, node: gs.Node) -> Callable[[np.ndarray], np.ndarray]:
        """W' -> the weight that the layer will read."""
        if self.weights == "keep" or node.op != "NMMatMul" or would_be_stored_twice(site, node):
            return lambda weight: weight
        return lambda weight: in_form(weight, self.weights).values()

    def _shift(self, op: gs.Node) -> np.ndarray | None:
        return shift_of(self.model, op) if "shift" in brought_by(op) else None

    def _add(self, site: Site, end: gs.Node | str, addend: gs.Tensor) -> gs.Node:
        """Add something behind a layer or what was added before; returns the last node."""
        assert isinstance(end, gs.Node)
        if end.op in FUSED:
            self.model.ends[site.name] = end.outputs[0].name
        return add_behind(self.model, self.names, site, self.made_by, addend, end=end)

    def _weight_place(self, site: Site, node: gs.Node, correction: Correction) -> Place | str | None:
        """None when no weight is to be replaced."""
        if correction.weight is None and correction.low is None:
            if correction.scale is None or node.op == "NMMatMulNBits":
                return None
            if node.op == "MatMulNBits":
                known = node.inputs[2].name in self.stored
                return None if known else "the scales of its weight are not stored in the main graph"
        return weight_place(self.model, site, node, self.embedded)

    def _bias_place(self, site: Site, node: gs.Node) -> int | str | None:
        """The input of `node` that takes a bias; None: it goes behind the layer."""
        if node.op in FUSED:
            place = INPUTS[node.op].index("bias")
            bias = _input(node, place)
            known = bias is None or bias.name in self.stored
            return place if known else f"its bias {bias.name!r} is no constant that can be read"  # type: ignore[union-attr]
        if node.op == "Gemm" and node.attrs.get("beta", 1.0) == 1.0 and not function_of(site.scope):
            c = _input(node, 2)
            if c is None or (c.name in self.stored and tuple(self.stored[c.name].dims) in ((site.n,), (1, site.n))):
                return 2
        return None

    def _put_weight(self, site: Site, place: Place, corrections: Corrections) -> None:
        def values() -> np.ndarray:
            made = in_type(folded_weight(corrections.sites[site.name], site), place.elem)
            return np.ascontiguousarray(made.T) if place.transposed else made

        name = self.names.fresh_tensor(f"{site.name}/weight")
        dims = (site.n, site.k) if place.transposed else (site.k, site.n)
        self.model.computed[name] = Computed(name, place.elem, dims, values)
        self.model.declared[name] = {"input": "W", "sha256": array_sha256(values()), "from": site.initializer}
        self._feed(place.node, place.slot, gs.Variable(name))

    def _put_scales(self, site: Site, node: gs.Node, scale: np.ndarray) -> None:
        if node.op == "NMMatMulNBits":
            place = INPUTS[node.op].index("scales")
            rows = self.model.computed[node.inputs[place].name]
            made = rows.values().astype(np.float32) * scale
            stored = self.constants.declare(
                site.scope, f"{site.name}/scales", "scales", in_type(made, rows.elem), rows.source
            )
            self._feed(node, place, stored)
            return
        old = self.model.tensors.array(self.stored[node.inputs[2].name])
        new = (old.astype(np.float32).reshape(site.n, -1) * scale[:, None]).reshape(old.shape).astype(old.dtype)
        stored = self.constants.declare(site.scope, f"{site.name}/scales", "scales", new, node.inputs[2].name)
        self._feed(node, 2, stored)

    def _put_bias(self, site: Site, node: gs.Node, bias: np.ndarray, slot: int) -> None:
        """`bias` [N] float64 is what comes on top of the bias that is there."""
        old = _input(node, slot)
        own = np.zeros(1) if old is None else self.model.tensors.array(self.stored[old.name])
        values = (own.reshape(-1).astype(np.float64) + bias).astype(helper.tensor_dtype_to_np_dtype(site.elem))
        replaced = old.name if old is not None else ""
        stored = self.constants.declare(site.scope, f"{site.name}/bias", "bias", values, replaced)
        while len(node.inputs) <= slot:
            node.inputs.append(gs.Variable.empty())
        self._feed(node, slot, stored)

    def _feed(self, node: gs.Node, slot: int, tensor: gs.Tensor) -> None:
        feeders = list(node.inputs[slot].inputs)
        node.inputs[slot] = tensor
        remove_dead(self.model, feeders)

    def extra_bytes(self) -> int:
        """Bytes of the new constants, less those of the weights that nothing reads any more."""
        drop_unread(self.model)
        read = set(read_names(self.model))
        new = [v.nbytes for n, v in self.model.constants.items() if n not in self.before and n in read]
        new += [
            byte_size(TensorProto(name=c.name, data_type=c.elem, dims=c.dims))
            for c in self.model.computed.values()
            if not c.source
        ]
        gone = {
            d["from"] for d in self.model.declared.values() if d["from"] in self.stored and d["from"] not in read
        } - {t.source.name for t in self.model.repacked.values()}
        return sum(new) - sum(byte_size(self.stored[name]) for name in gone)


def _input(node: gs.Node, slot: int) -> gs.Tensor | None:
    tensor = node.inputs[slot] if slot < len(node.inputs) else None
    return tensor if tensor is not None and tensor.name else None

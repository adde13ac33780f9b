"""Store the weights that fused ops read in fewer bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from nmonnx.digest import array_sha256
from nmonnx.errors import InputError
from nmonnx.nbits import BITS, BLOCK_SIZE, Quantised, in_form, relative_norm
from nmonnx.onnx_file.graph import Model, NewWeight
from nmonnx.passes.bodies import FUSED, INPUTS
from nmonnx.passes.fuse_matmul import inputs_of
from nmonnx.passes.packed_weight import add_parts, attributes, part
from nmonnx.passes.result import PassResult
from nmonnx.passes.surgery import Names, drop_unread, function_of, nodes_of_sites, remove_dead
from nmonnx.passes.weight_place import CARRIERS
from nmonnx.sites import Site


@dataclass(frozen=True)
class QuantiseWeights:
    """Give every `NMMatMul` a weight of `weights`: "fp16", or "int8" or "int4", of which it becomes `NMMatMulNBits`.

    1. int8 and int4 are rounded to the nearest of steps around 0, with a scale for each block of 32 channels, see
       `nmonnx.nbits.quantise`. A product of int4 may round its activation to 8 bits, as those of MatMulNBits do
       (accuracy_level 4).
    2. The new weight is made when it is written, one layer at a time; what it differs from the old by is told for each
       layer: |W' - W| / |W|, Frobenius norms.
    3. What makes up for a shift or a center is computed from the new weight.
    4. Left as it is, with the reason: a weight that something else reads too and that would be stored twice; one in a
       function; values that are not finite, or out of the range of float16.
    """

    weights: str = "keep"
    name: str = "quantise-weights"

    def apply(self, model: Model, sites: Sequence[Site]) -> PassResult:
        if self.weights == "keep":
            return PassResult(self.name)
        nodes = dict(nodes_of_sites(model))
        fused = [site for site in sites if site.name in nodes and nodes[site.name].op == "NMMatMul"]
        work = _Quantise(model, self.weights)
        reasons = {site.name: self._refusal(site, nodes[site.name]) for site in fused}
        left = {name: reason for name, reason in reasons.items() if reason}
        for site in fused:
            try:
                if site.name not in left:
                    work.site(site, nodes[site.name])
            except InputError as e:
                left[site.name] = str(e)
        remove_dead(model, work.dead)
        drop_unread(model)
        return PassResult(self.name, len(fused) - len(left), left)

    def _refusal(self, site: Site, node: gs.Node) -> str:
        if self.weights == "fp16" and site.fusable is not None and site.fusable.elem == TensorProto.FLOAT16:
            return "its weight is float16 already"
        return would_be_stored_twice(site, node)


def would_be_stored_twice(site: Site, node: gs.Node) -> str:
    """Why a new weight cannot take the place of the old one of an `NMMatMul`; "" when it can."""
    if function_of(site.scope):
        return "it lies in a function, whose weights serve every call; inline the functions first"
    if any(reader.op not in FUSED for reader in _readers(node.inputs[1])):
        return f"its weight {site.initializer!r} has other readers, and would be stored twice"
    return ""


def _readers(tensor: gs.Tensor) -> list[gs.Node]:
    """The nodes that read what the tensor is made from, through the nodes that only carry it."""
    while tensor.inputs and tensor.inputs[0].op in CARRIERS:
        tensor = tensor.inputs[0].inputs[0]
    found, tensors = [], [tensor]
    while tensors:
        for reader in tensors.pop().outputs:
            if reader.op in CARRIERS:
                tensors.append(reader.outputs[0])
            else:
                found.append(reader)
    return found


class _Quantise:
    def __init__(self, model: Model, form: str) -> None:
        self.model, self.form, self.names = model, form, Names(model)
        self.made: dict[str, tuple[dict[str, gs.Tensor], NewWeight]] = {}
        self.dead: list[gs.Node] = []

    def site(self, site: Site, node: gs.Node) -> None:
        """Give one layer its new weight, that of another layer where they share the old one. Raises InputError."""
        old = node.inputs[1]
        if old.name not in self.made:
            self.made[old.name] = self._make(site, old)
        tensors, self.model.weights[site.name] = self.made[old.name]
        given = dict(zip(INPUTS["NMMatMul"], node.inputs, strict=False)) | tensors
        if self.form in BITS:
            node.op = "NMMatMulNBits"
            node.attrs |= attributes(BITS[self.form], BLOCK_SIZE, accuracy_level=4 if self.form == "int4" else 0)
        node.inputs = inputs_of(node.op, given)
        self.dead += old.inputs

    def _make(self, site: Site, old: gs.Tensor) -> tuple[dict[str, gs.Tensor], NewWeight]:
        computed = self.model.computed.get(old.name)
        read: Callable[[], np.ndarray] = computed.values if computed else site.weight
        weight = read().astype(np.float32)
        made = in_form(weight, self.form)
        kept = made.arrays()
        error = relative_norm(made.values() - weight, weight)
        told = NewWeight(self.form, error, lambda: in_form(read(), self.form).values())
        parts = {"W": part(made.data, lambda: in_form(read(), self.form).data)}
        if isinstance(made, Quantised):
            scales = made.scales
            parts["scales"] = part(scales, lambda: scales)
        tensors = add_parts(self.model, self.names, f"{site.name}/weight_{self.form}", parts)
        self.model.computed.pop(old.name, None)
        replaced = self.model.declared.pop(old.name, {}).get("from", site.initializer)
        for slot, tensor in tensors.items():
            self.model.declared[tensor.name] = {"input": slot, "sha256": array_sha256(kept[slot]), "from": replaced}
        return tensors, told

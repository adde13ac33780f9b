"""Fuse a prune and the linear layer behind it into `NMMatMul` or `NMMatMulNBits`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs
from onnx import TensorProto

from nmonnx.errors import InputError
from nmonnx.onnx_file.graph import DOMAIN, Model, Transposed
from nmonnx.passes.bodies import CAST_LIKE_OPSET, INPUTS
from nmonnx.passes.packed_weight import Parts, add_parts, attributes, repacked
from nmonnx.passes.result import PassResult
from nmonnx.passes.surgery import Names, function_of, no_longer_serves, note, remove_dead
from nmonnx.sites import FusableWeight, Site


@dataclass(frozen=True)
class FuseMatMul:
    """Replace `NMPrune` + linear layer by one op, which reads only the rows of W that are kept: `NMMatMul`, or
    `NMMatMulNBits` where the weight is whole numbers with scales.

    1. A weight stored as [K, N] is used where it lies. One stored as [N, K], and whole numbers, are repacked once, when
       the model is saved, if every reader is fused; otherwise a second copy would be needed and the layer stays
       prune-only.
    2. A weight stored as fp16 behind a Cast is read as fp16; nodes that only served the weight go away.
    3. A prune that no layer reads any more goes away. So does a quantiser in front of a product of codes: the op reads
       the activation itself.
    4. kernel "auto" leaves prune-only what fusing would not speed up: patterns that keep everything, so that n = m is
       bit for bit the original, and weights of fewer than `worthwhile` elements, where one token gains nothing and many
       lose (benchmarks/kernels.py). With a `smaller` weight to come, what keeps everything is fused all the same.
       "fused" fuses those too; "prune" leaves every layer prune-only.
    5. What makes up for a shift or a center comes later: `FoldShift`, `FoldCenter`.
    """

    kernel: str = "auto"
    smaller: bool = False
    worthwhile: int = 1 << 16
    name: str = "fuse-matmul"

    def apply(self, model: Model, sites: Sequence[Site]) -> PassResult:
        if self.kernel == "prune":
            return PassResult(self.name)
        left: dict[str, str] = {}
        fused: list[Site] = []
        packed: dict[str, Parts] = {}
        alone = _read_by_layers_alone(model, sites)
        for site in sites:
            reason = self._refusal(site, alone)
            if not reason and site.quantised is not None:
                try:
                    packed[site.name] = repacked(site)
                except InputError as e:
                    reason = str(e)
            if reason:
                left[site.name] = reason
            else:
                fused.append(site)
        names = Names(model)
        dead = [node for site in fused for node in _fuse(model, names, site, packed.get(site.name), self.name)]
        remove_dead(model, dead)
        return PassResult(self.name, len(fused), left)

    def _refusal(self, site: Site, alone: set[str]) -> str:
        prune = _prune_of(site)
        if site.kernel == "NMPrune":
            return site.not_fusable
        if prune is None:
            return "no prune stands right in front of it"
        if self.kernel == "auto" and prune.attrs["keep"] == prune.attrs["group"] and not self.smaller:
            return "the pattern keeps every channel, so there is nothing to skip"
        if self.kernel == "auto" and site.k * site.n < self.worthwhile:
            return f"its weight has fewer than {self.worthwhile} elements, too few to gain from skipping rows"
        if site.quantised is not None:
            if function_of(site.scope):
                return "its weight is quantised and lies in a function, which cannot hold it repacked"
            if site.elem not in (TensorProto.FLOAT, TensorProto.FLOAT16):
                return "its activation is neither float32 nor float16"
        repacked = site.quantised is not None or (site.fusable is not None and site.fusable.transposed)
        if repacked and site.initializer not in alone:
            kind = "quantised" if site.quantised is not None else "stored as [N, K]"
            return f"its weight {site.initializer!r} is {kind} and has other readers: no second copy is made"
        return ""


def _prune_of(site: Site) -> gs.Node | None:
    """The prune right in front of the layer, or of the quantiser whose codes it reads."""
    consumer, index = site.splice[0]
    producers = consumer.inputs[index].inputs if consumer.inputs else []
    return producers[0] if producers and producers[0].op == "NMPrune" and producers[0].domain == DOMAIN else None


def _read_by_layers_alone(model: Model, sites: Sequence[Site]) -> set[str]:
    """Initializers of the main graph that must be repacked, and whose every reader is one of the sites that can be
    fused."""
    readers: dict[str, int] = {}
    stored: dict[str, gs.Tensor] = {}
    for site in sites:
        weight, codes = site.fusable, site.quantised
        moved = weight is not None and weight.transposed and weight.proto is not None
        if (moved or codes is not None) and _prune_of(site) is not None:
            readers[site.initializer] = readers.get(site.initializer, 0) + 1
            stored[site.initializer] = codes.stored if codes is not None else weight.tensor  # type: ignore[union-attr]
    in_main = {t.name for t in model.proto.graph.initializer} - {i.name for i in model.proto.graph.input}
    outputs = {t.name for t in model.graph.outputs}
    return {
        name
        for name, tensor in stored.items()
        if name in in_main and name not in outputs and _leaf_count(tensor) == readers[name]
    }


def _leaf_count(tensor: gs.Tensor) -> int:
    """Nodes that read the tensor, looking through the nodes that only carry a weight to its layer."""
    through = ("Transpose", "Cast", "Identity", "DequantizeLinear")
    return sum(_leaf_count(n.outputs[0]) if n.op in through else 1 for n in tensor.outputs)


def _fuse(model: Model, names: Names, site: Site, packed: Parts | None, made_by: str) -> list[gs.Node]:
    """Put the fused node where the layer was; returns the nodes that may be dead now."""
    prune, old = _prune_of(site), site.node
    how = site.quantised or site.fusable
    assert prune is not None and how is not None
    given = dict(zip(INPUTS["NMPrune"], prune.inputs, strict=False))
    attrs = {name: prune.attrs[name] for name in ("keep", "group", "variance", "center") if name in prune.attrs}
    if isinstance(how, FusableWeight):
        given["W"] = _weight_tensor(model, names, site, how)
    elif packed is not None:
        given |= add_parts(model, names, f"{site.initializer}/KN", packed)
        attrs |= attributes(how.bits, how.block_size, how.accuracy_level)
    if how.bias is not None:
        given["bias"] = how.bias
    end = _end(old, site)
    outputs = list(end.outputs)
    feeders = [producer for node in (old, end) for t in node.inputs for producer in t.inputs]
    for node in (end, old):
        node.outputs.clear()
        node.inputs.clear()
    fused = gs.Node(site.kernel, old.name, attrs, inputs_of(site.kernel, given), outputs, domain=DOMAIN)
    position = next(i for i, node in enumerate(site.graph.nodes) if node is end)
    site.graph.nodes[position] = fused
    if end is not old:
        site.graph.nodes[:] = [node for node in site.graph.nodes if node is not old]
    model.heirs[id(fused)] = model.origin[id(old)]
    note(model, fused, made_by, [site])
    no_longer_serves(model, prune, site)
    return feeders


def inputs_of(op: str, given: dict[str, gs.Tensor]) -> list[gs.Tensor]:
    """The inputs of a custom op by position, up to the last that is given."""
    slots = INPUTS[op]
    last = max(slots.index(slot) for slot, tensor in given.items() if tensor.name)
    return [given.get(slot, gs.Variable.empty()) for slot in slots[: last + 1]]


def _end(old: gs.Node, site: Site) -> gs.Node:
    """The node that makes the product: the layer, or the last of those that scale a product of codes."""
    output = site.quantised.output if site.quantised is not None else None
    return output.inputs[0] if output is not None else old


def _weight_tensor(model: Model, names: Names, site: Site, weight: FusableWeight) -> gs.Tensor:
    if weight.transposed:
        assert weight.proto is not None
        name = next(
            (n for n, t in model.repacked.items() if isinstance(t, Transposed) and t.source is weight.proto), None
        )
        if name is None:
            name = names.fresh_tensor(f"{site.initializer}/KN")
            model.repacked[name] = Transposed(name, weight.proto)
        return gs.Variable(name)
    half_behind_cast = weight.elem == TensorProto.FLOAT16 and site.elem == TensorProto.FLOAT
    if half_behind_cast and model.opset < CAST_LIKE_OPSET:  # the fallback body cannot widen it there
        return site.node.inputs[1]
    return weight.tensor

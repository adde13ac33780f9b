"""Fuse a prune and the linear layer behind it into `NMMatMul`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs
from onnx import TensorProto

from nmonnx.onnx_file.graph import DOMAIN, Model, Transposed
from nmonnx.passes.bodies import CAST_LIKE_OPSET
from nmonnx.passes.result import PassResult
from nmonnx.passes.surgery import Names, no_longer_serves, note, remove_dead
from nmonnx.sites import FusableWeight, Site


@dataclass(frozen=True)
class FuseMatMul:
    """Replace `NMPrune` + linear layer by one `NMMatMul`, which reads only the rows of W that are kept.

    1. A weight stored as [K, N] is used where it lies. One stored as [N, K] is repacked once, when the model is
       saved, if every reader of it is fused; otherwise a second copy would be needed and the layer stays prune-only.
    2. A weight stored as fp16 behind a Cast is read as fp16; nodes that only served the weight go away.
    3. A prune that no layer reads any more goes away.
    4. kernel "auto" leaves prune-only what fusing would not speed up: patterns that keep everything, so that n = m is
       bit for bit the original, and weights of fewer than `worthwhile` elements, where one token gains nothing and many
       lose (benchmarks/kernels.py).
       "fused" fuses those too; "prune" leaves every layer prune-only.
    5. What makes up for a shift or a center comes later: `FoldShift`, `FoldCenter`.
    """

    kernel: str = "auto"
    worthwhile: int = 1 << 16
    name: str = "fuse-matmul"

    def apply(self, model: Model, sites: Sequence[Site]) -> PassResult:
        if self.kernel == "prune":
            return PassResult(self.name)
        left: dict[str, str] = {}
        fused: list[Site] = []
        repackable = _repackable(model, sites)
        for site in sites:
            reason = self._refusal(site, repackable)
            if reason:
                left[site.name] = reason
            else:
                fused.append(site)
        names = Names(model)
        dead = [node for site in fused for node in _fuse(model, names, site, self.name)]
        remove_dead(model, dead)
        return PassResult(self.name, len(fused), left)

    def _refusal(self, site: Site, repackable: set[str]) -> str:
        weight = site.fusable
        prune = _prune_of(site)
        if weight is None:
            return site.not_fusable
        if prune is None:
            return "no prune stands right in front of it"
        if self.kernel == "auto" and prune.attrs["keep"] == prune.attrs["group"]:
            return "the pattern keeps every channel, so there is nothing to skip"
        if self.kernel == "auto" and site.k * site.n < self.worthwhile:
            return f"its weight has fewer than {self.worthwhile} elements, too few to gain from skipping rows"
        if weight.transposed and site.initializer not in repackable:
            return f"its weight {site.initializer!r} is stored as [N, K] and has other readers: no second copy is made"
        return ""


def _prune_of(site: Site) -> gs.Node | None:
    producers = site.node.inputs[0].inputs if site.node.inputs else []
    return producers[0] if producers and producers[0].op == "NMPrune" and producers[0].domain == DOMAIN else None


def _repackable(model: Model, sites: Sequence[Site]) -> set[str]:
    """Initializers of the main graph stored as [N, K] whose every reader is one of the sites that can be fused."""
    readers: dict[str, int] = {}
    stored: dict[str, FusableWeight] = {}
    for site in sites:
        weight = site.fusable
        if weight is not None and weight.transposed and weight.proto is not None and _prune_of(site) is not None:
            readers[site.initializer] = readers.get(site.initializer, 0) + 1
            stored[site.initializer] = weight
    in_main = {t.name for t in model.proto.graph.initializer} - {i.name for i in model.proto.graph.input}
    outputs = {t.name for t in model.graph.outputs}
    return {
        name
        for name, weight in stored.items()
        if name in in_main and name not in outputs and _leaf_count(weight.tensor) == readers[name]
    }


def _leaf_count(tensor: gs.Tensor) -> int:
    """Nodes that read the tensor, looking through the nodes that only carry a weight to its layer."""
    through = ("Transpose", "Cast", "Identity")
    return sum(_leaf_count(n.outputs[0]) if n.op in through else 1 for n in tensor.outputs)


def _fuse(model: Model, names: Names, site: Site, made_by: str) -> list[gs.Node]:
    """Put the fused node where the layer was; returns the nodes that may be dead now."""
    weight, prune, old = site.fusable, _prune_of(site), site.node
    assert weight is not None and prune is not None
    inputs = [prune.inputs[0], _weight_tensor(model, names, site, weight)]
    criterion = list(prune.inputs)[1:]
    if weight.bias is not None or criterion:
        inputs.append(weight.bias or gs.Variable.empty())
    inputs += criterion
    attrs = {name: prune.attrs[name] for name in ("keep", "group", "variance", "center") if name in prune.attrs}
    outputs = list(old.outputs)
    feeders = [producer for t in old.inputs for producer in t.inputs]
    old.outputs.clear()
    old.inputs.clear()
    fused = gs.Node("NMMatMul", old.name, attrs, inputs, outputs, domain=DOMAIN)
    position = next(i for i, node in enumerate(site.graph.nodes) if node is old)
    site.graph.nodes[position] = fused
    model.heirs[id(fused)] = model.origin[id(old)]
    note(model, fused, made_by, [site])
    no_longer_serves(model, prune, site)
    return feeders


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

"""The initializers that hold a weight of whole numbers as `NMMatMulNBits` reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper

from nmonnx.nbits import in_half, pack, packed_shape
from nmonnx.onnx_file.graph import Computed, Model
from nmonnx.passes.surgery import Names
from nmonnx.sites import Site

Parts = Mapping[str, Computed]
"""What goes to the inputs W, scales and zeros of the op, by input; names are given later."""


def attributes(bits: int, block_size: int, accuracy_level: int) -> dict[str, int]:
    """Those of the op that tell of its weight."""
    level = {"accuracy_level": accuracy_level} if accuracy_level == 4 else {}
    return {"bits": bits, "block_size": block_size, **level}


def repacked(site: Site) -> Parts:
    """The codes, scales (in float16 where that is exact) and zero points of the layer, in the layout of the op. Raises
    InputError, with the reason alone, for zero points that cannot be stored there."""
    how = site.quantised
    assert how is not None
    scales, zeros = in_half(how.scales()), how.zeros()
    if zeros is not None and zeros.dtype.kind == "f" and zeros.dtype != scales.dtype:
        scales = how.scales()  # floating-point zero points are of the type of the scales

    def data() -> np.ndarray:
        return pack(how.codes()) if how.bits == 4 else how.codes()

    parts = {
        "W": _part(code_type(how.bits), packed_shape(site.k, site.n, how.bits), data),
        "scales": part(scales, lambda: scales),
    }
    if zeros is not None:
        parts["zeros"] = part(zeros, lambda: zeros)
    return {slot: replace(made, source=how.sources.get(slot, how.sources["W"])) for slot, made in parts.items()}


def part(like: np.ndarray, values: Callable[[], np.ndarray]) -> Computed:
    """An initializer of the type and shape of an array, which `values` makes again."""
    return _part(like.dtype, like.shape, values)


def _part(dtype: np.dtype, dims: tuple[int, ...], values: Callable[[], np.ndarray]) -> Computed:
    return Computed("", helper.np_dtype_to_tensor_dtype(dtype), dims, values)


def code_type(bits: int) -> np.dtype:
    return np.dtype(np.uint8 if bits == 4 else np.int8)


def add_parts(model: Model, names: Names, wanted: str, parts: Parts) -> dict[str, gs.Tensor]:
    """Add the initializers, as `wanted`, `wanted_scales` and `wanted_zeros`; one that is there from the same stored
    tensor, for another layer that shares the weight, is taken."""
    tensors: dict[str, gs.Tensor] = {}
    for slot, made in parts.items():
        like = wanted if slot == "W" else f"{wanted}_{slot}"
        shared = made.source and like in model.computed and model.computed[like].source == made.source
        name = like if shared else names.fresh_tensor(like)
        model.computed[name] = replace(made, name=name)
        tensors[slot] = gs.Variable(name)
    return tensors

"""The arithmetic of a correction: the new weight and bias of a layer, rounded once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import helper

from nmonnx.errors import InputError
from nmonnx.records.corrections import Correction
from nmonnx.sites import Site


def folded_weight(correction: Correction, site: Site) -> np.ndarray:
    """W' = (weight - A B) diag(scale) as float32 [K, N]. Raises InputError when the weight has no single value."""
    weight = site.weight() if correction.weight is None else correction.weight
    if correction.low is not None:
        weight = weight - correction.low[0] @ correction.low[1]
    return weight if correction.scale is None else weight * correction.scale


def added_bias(
    correction: Correction, site: Site, shift: np.ndarray | None, stored: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """bias + shift W' as float64 [N]: what comes on top of the layer's own bias. `shift` is [K] or [1]; `stored` says
    what W' is once it is stored."""
    bias = np.zeros(site.n) if correction.bias is None else correction.bias.astype(np.float64)
    if shift is None:
        return bias
    wide = np.broadcast_to(shift, site.k).astype(np.float64)
    return bias + wide @ stored(folded_weight(correction, site)).astype(np.float64)


def in_type(values: np.ndarray, elem: int) -> np.ndarray:
    """The values in a TensorProto element type. Raises InputError when a finite one is beyond its range."""
    with np.errstate(over="ignore"):
        made = values.astype(helper.tensor_dtype_to_np_dtype(elem), copy=False)
    if not np.isfinite(made).all():
        raise InputError(f"a correction holds values beyond the range of {made.dtype}, or none that are finite")
    return made


def check_shapes(correction: Correction, site: Site) -> None:
    """Raise InputError unless the correction is of a layer of this size, and finite."""
    k, n = site.k, site.n
    rank = correction.low[0].shape[-1] if correction.low is not None else 0
    expected = {
        "shift": ((k,), (1,)),
        "weight": ((k, n),),
        "scale": ((n,),),
        "bias": ((n,),),
        "low_a": ((k, rank),),
        "low_b": ((rank, n),),
    }
    for part, values in correction.arrays().items():
        if values.shape not in expected[part]:
            wanted = " or ".join(str(list(shape)) for shape in expected[part])
            raise InputError(
                f"the correction of layer {site.name!r} has a {part} of shape {list(values.shape)}, not {wanted};"
                " it is of another model"
            )
        if not np.isfinite(values).all():
            raise InputError(f"the correction of layer {site.name!r} has a {part} that is not finite; fit again")

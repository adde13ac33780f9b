"""Write a model and its weights, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import BinaryIO

import numpy as np
from onnx import ModelProto, TensorProto

from nmonnx.errors import InputError
from nmonnx.models.graph_builder import Weight, element_type

ALIGNMENT, PAGE, BIG = 64, 4096, 1 << 20
Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes in all)."""


def write_model(model: ModelProto, weights: Collection[Weight], path: Path, progress: Progress | None = None) -> None:
    """Write the weights to `path`.data, name them in the model, write the model to `path`.

    Offsets are multiples of 64 bytes, of 4096 for tensors of 1 MiB and more. Raises InputError when a value
    does not fit fp16 or a tensor has another shape than was declared.
    """
    total, done = sum(w.size for w in weights), 0
    data = path.with_name(f"{path.name}.data")
    with open(data, "wb") as f:
        for weight in weights:
            offset = _append(f, weight)
            model.graph.initializer.append(_external(weight, data.name, offset))
            done += weight.size
            if progress:
                progress(done, total)
    path.write_bytes(model.SerializeToString())


def _append(f: BinaryIO, weight: Weight) -> int:
    f.write(bytes(-f.tell() % (PAGE if weight.size >= BIG else ALIGNMENT)))
    offset = f.tell()
    _stored(weight).tofile(f)
    return offset


def _stored(weight: Weight) -> np.ndarray:
    values = weight.read()
    if values.shape != weight.shape:
        raise InputError(f"weight {weight.name!r} was declared {list(weight.shape)}, read {list(values.shape)}")
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(values, dtype=weight.dtype)
    if weight.dtype == np.float16 and not np.isfinite(stored).all():
        raise InputError(f"weight {weight.name!r} has values that fp16 cannot hold; build fp32 instead")
    return stored


def _external(weight: Weight, location: str, offset: int) -> TensorProto:
    tensor = TensorProto(name=weight.name, data_type=element_type(weight.dtype), dims=weight.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(weight.size))):
        tensor.external_data.add(key=key, value=value)
    return tensor

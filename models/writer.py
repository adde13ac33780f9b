"""Write a model and its weights: one tensor in memory at a time, the files in place only when complete."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
from onnx import ModelProto, TensorProto

from nmonnx.errors import InputError
from nmonnx.models.graph_builder import Weight, element_type

ALIGNMENT, PAGE, BIG = 64, 4096, 1 << 20
Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes in all)."""


def write_model(model: ModelProto, weights: Iterable[Weight], path: Path, progress: Progress | None = None) -> None:
    """Add `weights` to the model as external data in `path`.data and write both files.

    Offsets are multiples of 64 bytes, of 4096 for tensors of 1 MiB and more. Raises InputError when a value
    does not fit fp16 or a reader gives another shape than it declared; then neither file is touched.
    """
    data = path.with_name(f"{path.name}.data")
    temporary = {file: file.with_name(f".{file.name}.{os.getpid()}.tmp") for file in (data, path)}
    with ExitStack() as stack:
        for file in temporary.values():
            stack.callback(file.unlink, missing_ok=True)
        with open(temporary[data], "wb") as f:
            _write_data(f, model, list(weights), data.name, progress)
        temporary[path].write_bytes(model.SerializeToString())
        for file, part in temporary.items():
            os.replace(part, file)


def _write_data(
    f: BinaryIO, model: ModelProto, weights: list[Weight], location: str, progress: Progress | None
) -> None:
    total, done = sum(w.size for w in weights), 0
    for weight in weights:
        step = PAGE if weight.size >= BIG else ALIGNMENT
        f.write(bytes(-f.tell() % step))
        model.graph.initializer.append(_external(weight, location, f.tell()))
        f.write(memoryview(_values(weight)).cast("B"))
        done += weight.size
        if progress:
            progress(done, total)


def _values(weight: Weight) -> np.ndarray:
    values = weight.read()
    if values.shape != weight.shape:
        raise InputError(f"weight {weight.name!r}: values of shape {values.shape}, {weight.shape} was declared")
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

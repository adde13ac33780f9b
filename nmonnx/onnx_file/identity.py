"""Which model a file of measurements belongs to."""

from __future__ import annotations

import hashlib
from pathlib import Path

from nmonnx.digest import file_sha256
from nmonnx.onnx_file.graph import read_skeleton
from nmonnx.onnx_file.tensors import TensorReader, all_tensors, is_external

_PIECE = 1024


def model_sha256(path: Path) -> str:
    """SHA-256 of the .onnx file and, where weights lie in other files, of the first, middle and last KiB of each: two
    trainings of one architecture differ, and no large file is read whole. Raises InputError."""
    own = file_sha256(path)
    outside = [tensor for tensor in all_tensors(read_skeleton(path)) if is_external(tensor)]
    if not outside:
        return own
    digest, reader = hashlib.sha256(own.encode()), TensorReader(path)
    for tensor in outside:
        values = reader.bytes_of(tensor)
        for start in (0, len(values) // 2, max(0, len(values) - _PIECE)):
            digest.update(values[start : start + _PIECE])
    return digest.hexdigest()

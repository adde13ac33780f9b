"""Compare stored tensors piece by piece, so that models of any size need the memory of one piece."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

import numpy as np
from onnx import TensorProto

from nmonnx.onnx_file.tensors import TensorReader, is_external, type_name

_PIECE = 4 << 20


def same_values(a: TensorProto, in_a: TensorReader, b: TensorProto, in_b: TensorReader) -> bool:
    """Whether two tensors have the same type, shape and bytes. Reads nothing when both are the same range of the same
    file. Raises InputError when external data is missing."""
    if (a.data_type, list(a.dims)) != (b.data_type, list(b.dims)):
        return False
    if a.data_type == TensorProto.STRING:
        return list(a.string_data) == list(b.string_data)
    if _same_place(a, in_a, b, in_b):
        return True
    return all(
        len(x) == len(y) and np.array_equal(np.frombuffer(x, np.uint8), np.frombuffer(y, np.uint8))
        for x, y in zip_longest(pieces(a, in_a), pieces(b, in_b), fillvalue=b"")
    )


def pieces(tensor: TensorProto, reader: TensorReader) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor, 4 MiB at a time, read rather than mapped."""
    if not is_external(tensor):
        raw = reader.bytes_of(tensor)
        for start in range(0, len(raw), _PIECE):
            yield raw[start : start + _PIECE]
        return
    path, offset, length = reader.span(tensor)
    with open(path, "rb") as file:
        file.seek(offset)
        for start in range(0, length, _PIECE):
            yield file.read(min(_PIECE, length - start))


def shape_text(tensor: TensorProto) -> str:
    """ "FLOAT[576, 1536]" """
    return f"{type_name(tensor.data_type)}{list(tensor.dims)}"


def _same_place(a: TensorProto, in_a: TensorReader, b: TensorProto, in_b: TensorReader) -> bool:
    if not (is_external(a) and is_external(b)):
        return False
    (file_a, offset_a, _), (file_b, offset_b, _) = in_a.span(a), in_b.span(b)
    return offset_a == offset_b and (file_a == file_b or file_a.samefile(file_b))

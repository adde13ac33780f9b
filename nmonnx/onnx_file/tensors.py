"""Read the tensors of a model where they lie: inside the file or in external data, never copied at load.

External data is opened only inside the model's own folder (or, for a Hugging Face cache whose
snapshot links into `blobs/`, beside the real model file), and only after its range was checked
against the file.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, TensorProto

from nmonnx.errors import InputError

_FOUR_BITS = {TensorProto.UINT4, TensorProto.INT4, getattr(TensorProto, "FLOAT4E2M1", 23)}
_TWO_BITS = {25, 26}  # UINT2, INT2: newer than some supported onnx releases
_RAW_DTYPE: dict[int, type] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.DOUBLE: np.float64,
    TensorProto.INT8: np.int8,
    TensorProto.UINT8: np.uint8,
    TensorProto.INT16: np.int16,
    TensorProto.UINT16: np.uint16,
    TensorProto.INT32: np.int32,
    TensorProto.UINT32: np.uint32,
    TensorProto.INT64: np.int64,
    TensorProto.UINT64: np.uint64,
    TensorProto.BOOL: np.bool_,
}
_ITEM_BITS: dict[int, int] = {t: np.dtype(d).itemsize * 8 for t, d in _RAW_DTYPE.items()}
_ITEM_BITS |= {TensorProto.BFLOAT16: 16, TensorProto.COMPLEX64: 64, TensorProto.COMPLEX128: 128}
_COMPLEX = {TensorProto.COMPLEX64, TensorProto.COMPLEX128}
_ITEM_BITS |= dict.fromkeys(_FOUR_BITS, 4) | dict.fromkeys(_TWO_BITS, 2)


class TensorReader:
    """The bytes of any tensor of the model at `path`; files stay memory-mapped while it lives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path.parent
        self._roots = (self.folder.resolve(), path.resolve().parent)
        self._files: dict[str, tuple[Path, int]] = {}
        self._maps: dict[str, mmap.mmap] = {}

    def span(self, tensor: TensorProto) -> tuple[Path, int, int]:
        """(file, offset, length) of an external tensor. Raises InputError when the file is missing,
        outside the model's folder, or too short."""
        fields = external_fields(tensor)
        location = fields.get("location", "")
        where = f"tensor {tensor.name!r} of {self.path}"
        file, size = self._open(location, where)
        try:
            offset, given = int(fields.get("offset") or 0), int(fields.get("length") or 0)
        except ValueError as e:
            raise InputError(f"{where}: external data offset or length is not a number") from e
        length = byte_size(tensor, where)
        if given and given != length:
            raise InputError(f"{where}: external data length is {given}, its shape needs {length} bytes")
        if offset < 0 or offset > size or length > size - offset:
            raise InputError(
                f"{where}: needs {length} bytes at offset {offset} of {location!r}, which has {size} bytes;"
                " the file is truncated or belongs to another model, copy or export it again"
            )
        return file, offset, length

    def bytes_of(self, tensor: TensorProto) -> memoryview:
        """The raw little-endian bytes of a tensor, without copying external data."""
        if is_external(tensor):
            file, offset, length = self.span(tensor)
            return self._map(file)[offset : offset + length] if length else memoryview(b"")
        if tensor.HasField("raw_data"):
            return memoryview(tensor.raw_data)
        return memoryview(np.ascontiguousarray(onnx.numpy_helper.to_array(tensor)).tobytes())

    def array(self, tensor: TensorProto) -> np.ndarray:
        """The values in the tensor's shape: a read-only view where they lie, 4-bit codes widened to int8/uint8,
        bfloat16 to float32."""
        dims, kind = tuple(tensor.dims), tensor.data_type
        if not is_external(tensor) and not tensor.HasField("raw_data"):
            return np.asarray(onnx.numpy_helper.to_array(tensor))
        raw = self.bytes_of(tensor)
        if kind in (TensorProto.UINT4, TensorProto.INT4):
            codes = unpack_bits(np.frombuffer(raw, np.uint8), 4)[: math.prod(dims)].reshape(dims)
            return ((codes ^ 8).astype(np.int8) - 8) if kind == TensorProto.INT4 else codes
        if kind == TensorProto.BFLOAT16:
            wide = np.frombuffer(raw, np.uint16).astype(np.uint32) << 16
            return wide.view(np.float32).reshape(dims)
        if kind not in _RAW_DTYPE:
            raise InputError(f"tensor {tensor.name!r}: cannot read values of type {type_name(kind)}")
        return np.frombuffer(raw, _RAW_DTYPE[kind]).reshape(dims)

    def sha256(self, tensor: TensorProto) -> str:
        """Hash of type, shape and bytes, streamed."""
        digest = hashlib.sha256(f"{tensor.data_type}:{list(tensor.dims)}:".encode())
        if tensor.data_type == TensorProto.STRING:
            digest.update(b"\0".join(tensor.string_data))
            return digest.hexdigest()
        raw = self.bytes_of(tensor)
        for start in range(0, len(raw), 1 << 22):
            digest.update(raw[start : start + (1 << 22)])
        return digest.hexdigest()

    def _open(self, location: str, where: str) -> tuple[Path, int]:
        if location in self._files:
            return self._files[location]
        if not location:
            raise InputError(f"{where}: external data without a location")
        path = Path(location)
        if path.is_absolute() or ".." in path.parts or "..\\" in location:
            raise InputError(f"{where}: external data location {location!r} leaves the model's folder; refused")
        try:
            real = Path(os.path.realpath(self.folder / path))
            if not any(real.is_relative_to(root) for root in self._roots):
                raise InputError(
                    f"{where}: external data {location!r} is a link to a place outside the model's folder; refused"
                )
            self._files[location] = (real, size_of(real))
        except FileNotFoundError as e:
            missing = str(self.folder / path)
            raise InputError(f"{where}: external data file {missing!r} is missing; copy it beside the model") from e
        except (OSError, ValueError) as e:
            raise InputError(f"{where}: external data {location[:200]!r} cannot be read: {why(e)}") from e
        return self._files[location]

    def _map(self, file: Path) -> memoryview:
        key = str(file)
        if key not in self._maps:
            try:
                with open(file, "rb") as f:
                    self._maps[key] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as e:
                raise InputError(f"external data {key!r} of {self.path} cannot be read: {why(e)}") from e
        return memoryview(self._maps[key])


def size_of(file: Path) -> int:
    """Bytes of a regular file that can be read. Raises OSError for one that cannot, and for anything else (a folder,
    a pipe, a device)."""
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise OSError(0, "it is not a regular file")
    with open(file, "rb") as f:
        return os.fstat(f.fileno()).st_size


def why(error: Exception) -> str:
    """The reason of a failed read, without the path that the sentence around it names."""
    return getattr(error, "strerror", None) or str(error)


def external_fields(tensor: TensorProto) -> dict[str, str]:
    """What an external tensor says of its data: location, offset, length, checksum, as far as they are there."""
    return {e.key: e.value for e in tensor.external_data}


def unpack_bits(packed: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [..., bytes] -> codes [..., bytes * 8 / bits], the low bits first; `bits` is 1, 2, 4 or 8."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & ((1 << bits) - 1)).reshape(*packed.shape[:-1], -1)


def is_external(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL


def byte_size(tensor: TensorProto, where: str = "") -> int:
    """Bytes that the shape and type ask for; 4-bit types are packed two a byte."""
    where = where or f"tensor {tensor.name!r}"
    if any(d < 0 for d in tensor.dims):
        raise InputError(f"{where}: negative dimension in shape {list(tensor.dims)}")
    count = math.prod(tensor.dims)
    bits = _ITEM_BITS.get(tensor.data_type, 8)
    if count * bits >= 1 << 63:
        raise InputError(f"{where}: shape {list(tensor.dims)} asks for more bytes than a file can hold")
    return (count * bits + 7) // 8


def check_inline(tensor: TensorProto, where: str) -> None:
    """Raise InputError unless the data inside the tensor is of a known type and as long as its shape asks for."""
    kind = tensor.data_type
    if kind not in TensorProto.DataType.values() or kind == TensorProto.UNDEFINED:
        raise InputError(f"{where}: its element type {kind} is unknown to onnx {onnx.__version__}; upgrade onnx")
    size = byte_size(tensor, where)
    if tensor.HasField("raw_data"):
        held, unit = len(tensor.raw_data), "bytes"
        if kind == TensorProto.STRING:
            raise InputError(f"{where}: text cannot be stored as raw bytes; export it again")
    else:
        held, unit = len(getattr(tensor, onnx.helper.tensor_dtype_to_field(kind))), "values"
        size = size if kind in _FOUR_BITS | _TWO_BITS else math.prod(tensor.dims) * (2 if kind in _COMPLEX else 1)
    if held != size:
        raise InputError(
            f"{where}: holds {held} {unit}, but its shape {list(tensor.dims)} and type {type_name(kind)} need {size};"
            " the file is damaged, export or copy it again"
        )


def type_name(kind: int) -> str:
    """ "FLOAT16" for 10; the number itself for a type this onnx release does not know."""
    try:
        return TensorProto.DataType.Name(kind)
    except ValueError:
        return f"type {kind}"


def all_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor of the model: initializers, sparse ones, attributes, in subgraphs and functions too."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    yield from _node_tensors(graph.node)


def _node_tensors(nodes) -> Iterator[TensorProto]:  # type: ignore[no-untyped-def]
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == onnx.AttributeProto.TENSORS:
                yield from attribute.tensors
            elif attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graph_tensors(attribute.g)
            elif attribute.type == onnx.AttributeProto.GRAPHS:
                for graph in attribute.graphs:
                    yield from _graph_tensors(graph)

"""Write a model: weights streamed into one data file, temporary files renamed at the end, the input untouched."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import MappingProxyType
from typing import BinaryIO

import numpy as np
from onnx import TensorProto
from onnx.external_data_helper import set_external_data

from nmonnx.errors import InputError, ModelError, UsageError
from nmonnx.onnx_file.graph import Model
from nmonnx.onnx_file.tensors import all_tensors, byte_size, is_external
from nmonnx.onnx_file.weave import weave
from nmonnx.onnx_file.weight_pruning import PrunedWeight

INLINE_LIMIT = 1_500_000_000
"""A model without external data gets some once it grows beyond this many bytes (protobuf ends at 2 GiB)."""

_CHUNK = 16 << 20
_PAGE, _LINE, _LARGE = 4096, 64, 1 << 20


def save(
    model: Model, out: str | Path, overwrite: bool = False, sidecars: Mapping[str, bytes] = MappingProxyType({})
) -> Path:
    """Write the edited model to `out`, with its weights where they belong:

    1. A model without external data stays one file.
    2. Written into the folder of the original, it shares the original's data files; new weights go to
       OUT.data. Written anywhere else, every weight is copied to OUT.data, shared ranges once, unused bytes
       not at all, so that the folder stands alone.
    3. Offsets are multiples of 64 bytes, of 4096 for tensors of 1 MiB and more.
    4. `sidecars` are further files of the folder, name -> content, written with it.

    Raises UsageError when a file is in the way, ModelError when writing fails (nothing is left behind then).
    """
    out = Path(out)
    data = out.with_name(out.name + ".data")
    inputs = [model.path, *model.data_files()]
    refuse_clash(out, inputs, overwrite)
    proto = weave(model)
    tensors = list(all_tensors(proto))
    external = [t for t in tensors if is_external(t)]
    inside = [t for t in tensors if not is_external(t)]
    too_big = sum(byte_size(t) for t in inside) > INLINE_LIMIT  # not ByteSize(): protobuf raises beyond 2 GiB
    moved = [] if _may_share(model, out) else external
    if too_big:
        moved = moved + [t for t in inside if _is_large(t)]
    repacked = [t for t in proto.graph.initializer if t.name in model.repacked or t.name in model.computed]
    if not too_big and not any(is_external(t) for t in all_tensors(model.proto)):
        for tensor in repacked:
            tensor.raw_data = b"".join(_made(model, tensor.name))
        repacked = []
    if moved or repacked:
        refuse_clash(data, inputs, overwrite)
    with staging(out) as staged:
        if moved or repacked:
            _write_data(model, moved, repacked, staged.open(data), data.name)
        staged.open(out).write(proto.SerializeToString())
        for name, content in sidecars.items():
            staged.open(out.with_name(name)).write(content)
    return out


def refuse_clash(file: Path, inputs: Iterable[Path], overwrite: bool, whose: str = "part of the input model") -> None:
    """Refuse an output that has no folder, that is there already without `overwrite`, or that is one of the `inputs`,
    which are `whose`. Raises UsageError."""
    try:
        if not file.parent.is_dir():
            raise UsageError(f"the folder {str(file.parent)!r} does not exist; create it first")
        if file.is_dir():
            raise UsageError(f"{file} is a folder; name a file, for example {file / 'sparse.onnx'}")
        if file.exists() and any(source.exists() and file.samefile(source) for source in inputs):
            raise UsageError(f"{file} is {whose}, which is never changed; choose another output")
        if file.exists() and not overwrite:
            raise UsageError(f"{file} exists; use --overwrite to replace it, or choose another output")
    except OSError as e:
        raise UsageError(f"{str(file)[:200]!r} cannot be an output: {e.strerror}; choose another name or folder") from e


def _may_share(model: Model, out: Path) -> bool:
    plain = not model.path.is_symlink() and all(
        not (model.path.parent / _location(t)).is_symlink() for t in all_tensors(model.proto) if is_external(t)
    )
    return plain and out.parent.resolve() == model.path.parent.resolve()


def _location(tensor: TensorProto) -> str:
    return next((e.value for e in tensor.external_data if e.key == "location"), "")


def _is_large(tensor: TensorProto) -> bool:
    return tensor.HasField("raw_data") and len(tensor.raw_data) >= _LARGE


def _write_data(model: Model, moved: list[TensorProto], repacked: list[TensorProto], file: BinaryIO, name: str) -> None:
    written: dict[tuple[str, int, int], int] = {}
    for tensor in moved:
        size = byte_size(tensor)
        key = None
        if is_external(tensor):
            source, offset, _ = model.tensors.span(tensor)
            key = (str(source), offset, size)
        start = written.get(key) if key else None
        if start is None:
            start = _pad(file, size)
            for piece in _pieces(model, tensor):
                file.write(piece)
            if key:
                written[key] = start
        _point(tensor, name, start, size)
    for tensor in repacked:
        start = _pad(file, byte_size(tensor))
        for block in _made(model, tensor.name):
            file.write(block)
        _point(tensor, name, start, byte_size(tensor))


def _pieces(model: Model, tensor: TensorProto) -> Iterator[bytes]:
    """The bytes of a tensor, read rather than mapped, so that memory stays that of one piece."""
    if not is_external(tensor):
        yield bytes(model.tensors.bytes_of(tensor))
        return
    source, offset, left = model.tensors.span(tensor)
    try:
        file = open(source, "rb")  # noqa: SIM115 - only opening it is the input's fault
    except OSError as e:
        raise InputError(f"cannot read {source}: {e.strerror}") from e
    with file:
        file.seek(offset)
        while left:
            piece = file.read(min(left, _CHUNK))
            left -= len(piece)
            yield piece


def _pad(file: BinaryIO, size: int) -> int:
    align = _PAGE if size >= _LARGE else _LINE
    file.write(b"\0" * (-file.tell() % align))
    return file.tell()


def _point(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    tensor.raw_data = b""
    set_external_data(tensor, location, offset, length)
    tensor.ClearField("raw_data")


def _made(model: Model, name: str) -> Iterator[bytes]:
    """The bytes of a weight that is transposed, pruned or computed only now."""
    if name in model.computed:
        yield np.ascontiguousarray(model.computed[name].values()).tobytes()
        return
    new = model.repacked[name]
    stored = model.tensors.array(new.source)
    if isinstance(new, PrunedWeight):
        yield new.values(stored).tobytes()
        return
    rows = max(1, _CHUNK // max(1, stored.shape[0] * stored.itemsize))
    for at in range(0, stored.shape[1], rows):
        yield np.ascontiguousarray(stored[:, at : at + rows].T).tobytes()


class Staged:
    """Files written under temporary names beside their places, and put there together at the end."""

    def __init__(self) -> None:
        self._files: list[tuple[BinaryIO, Path]] = []

    def open(self, place: Path) -> BinaryIO:
        """A new file that will take the place of `place`."""
        self._files.append((NamedTemporaryFile(prefix=f".{place.name[:80]}.", dir=place.parent, delete=False), place))  # type: ignore[arg-type]  # noqa: SIM115
        return self._files[-1][0]

    def publish(self) -> None:
        """Everything is on the disk before the first name changes."""
        for file, _ in self._files:
            file.close()
            os.chmod(file.name, 0o666 & ~_umask())
        for file, place in self._files:
            os.replace(file.name, place)

    def discard(self) -> None:
        for file, _ in self._files:
            with suppress(OSError):
                file.close()
            with suppress(OSError):
                os.unlink(file.name)


@contextmanager
def staging(out: Path) -> Iterator[Staged]:
    """Files that appear when the block ends well; when it does not, nothing is left behind. Raises ModelError when
    the disk is full or the folder cannot be written."""
    staged = Staged()
    try:
        yield staged
        staged.publish()
    except BaseException as e:
        staged.discard()
        if isinstance(e, OSError):
            raise ModelError(f"cannot write {out}: {e.strerror or e}; nothing was left behind") from e
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

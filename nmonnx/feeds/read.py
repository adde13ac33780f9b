"""Input arrays that the user gives: .npz files or folders of .npy files, one array per graph input."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from nmonnx.errors import InputError
from nmonnx.feeds.make import check_array
from nmonnx.feeds.sample import Feed
from nmonnx.feeds.signature import Port, Signature
from nmonnx.onnx_file.tensors import why


def read_feeds(path: str | Path, sig: Signature) -> list[Feed]:
    """One feed from an .npz file; from a folder one per .npz file in it, or, when it holds .npy files, one feed with
    an array per file. Arrays are named as the graph's inputs. Raises InputError when a name, a type or a shape does
    not fit, or a file cannot be read."""
    path = Path(path)
    try:
        if not path.is_dir():
            path.stat()
            return [Feed(path.stem, _fit(_load(path), sig, path))]
        archives, arrays = sorted(path.glob("*.npz")), sorted(path.glob("*.npy"))
    except FileNotFoundError as e:
        raise InputError(f"{path} does not exist") from e
    except OSError as e:
        raise InputError(f"{str(path)[:200]!r} cannot be read: {why(e)}") from e
    if archives:
        return [feed for archive in archives for feed in read_feeds(archive, sig)]
    if arrays:
        return [Feed(path.name, _fit({f.stem: _load(f) for f in arrays}, sig, path))]
    raise InputError(f"{path} holds no .npz and no .npy file; save arrays with numpy.savez(file, input_ids=...)")


def _load(path: Path):  # type: ignore[no-untyped-def]
    try:
        content = np.load(path, allow_pickle=False)
        return dict(content) if isinstance(content, np.lib.npyio.NpzFile) else content
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise InputError(f"{path} is damaged, or no NumPy file without pickled objects") from e


def _fit(arrays: dict[str, np.ndarray] | np.ndarray, sig: Signature, path: Path) -> dict[str, np.ndarray]:
    """The arrays, checked against the inputs; an integer or float array of another width is converted when that
    loses nothing."""
    if not isinstance(arrays, dict):
        raise InputError(f"{path} holds one array without a name; save an .npz with one array per input")
    ports = {p.name: p for p in sig.inputs}
    missing, unknown = sorted(ports.keys() - arrays.keys()), sorted(arrays.keys() - ports.keys())
    if missing or unknown:
        lacks = f" lacks inputs {missing}" if missing else ""
        extra = f" has arrays {unknown} that are no inputs" if unknown else ""
        raise InputError(f"{path}{lacks}{' and' if lacks and extra else ''}{extra}; the inputs are {sorted(ports)}")
    fitted = {name: _converted(arrays[name], port) for name, port in ports.items()}
    for name, port in ports.items():
        check_array(port, fitted[name], str(path))
    return fitted


def _converted(array: np.ndarray, port: Port) -> np.ndarray:
    if array.dtype.kind in "iu" and port.dtype.kind in "iu":
        with np.errstate(all="ignore"):
            cast = array.astype(port.dtype)
        return cast if np.array_equal(cast, array) else array
    return array

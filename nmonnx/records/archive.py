"""Accumulators and what is said about them in one .npz file, without pickled objects."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nmonnx.errors import InputError
from nmonnx.onnx_file.save import staging
from nmonnx.onnx_file.tensors import why
from nmonnx.records.accumulator import Accumulator

SCHEMA_VERSION = 1
_KIND = "nmonnx activation statistics"


def write_archive(path: Path, about: dict[str, Any], parts: Sequence[Accumulator]) -> None:
    """Write under a temporary name, then rename: `about`, which JSON can hold, and the parts, with a copy of one part
    in memory at a time. The same content gives the same bytes. Raises ModelError when the disk is full or the folder
    cannot be written."""
    head = {"kind": _KIND, "schema_version": SCHEMA_VERSION, "parts": len(parts), **about}
    with staging(path) as staged, zipfile.ZipFile(staged.open(path), "w") as file:
        _add(file, "about", np.frombuffer(json.dumps(head).encode(), np.uint8))
        for number, part in enumerate(parts):
            for name, array in part.arrays().items():
                _add(file, f"{number}.{name}", array)


def read_archive(path: Path) -> tuple[dict[str, Any], list[Accumulator]]:
    """What `write_archive` wrote. Raises InputError when the file is missing, damaged, something else, or of another
    schema version."""
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(bytes(file["about"]))
            if about["kind"] != _KIND:
                raise ValueError("another kind of file")
            if about["schema_version"] != SCHEMA_VERSION:
                has = about["schema_version"]
                raise InputError(
                    f"{path} has schema version {has}, this nmonnx reads {SCHEMA_VERSION}; calibrate again"
                )
            names = [name.partition(".")[2] for name in file.files if name.startswith("0.")]
            parts = [{name: file[f"{i}.{name}"] for name in names} for i in range(about["parts"])]
            return about, [Accumulator.from_arrays(arrays) for arrays in parts]
    except FileNotFoundError as e:
        raise InputError(f"{path} does not exist; write it with `nmonnx calibrate`") from e
    except OSError as e:
        raise InputError(f"{path} cannot be read: {why(e)}") from e
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise InputError(
            f"{path} holds no activation statistics, or is damaged; write it again with `nmonnx calibrate`"
        ) from e


def _add(file: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """As numpy.savez does, whose archives hold no time of day either."""
    with file.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry:
        np.lib.format.write_array(entry, array, allow_pickle=False)

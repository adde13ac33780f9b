"""The file of corrections: written and read one array at a time, so that memory stays that of one layer."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

ABOUT = "about"
PARTS = ("shift", "weight", "scale", "bias", "low_a", "low_b")


def write_parts(
    file: IO[bytes], about: Mapping[str, Any], parts: Iterator[tuple[str, Mapping[str, np.ndarray]]]
) -> None:
    """An .npz file of what `about` says (as JSON) and of the arrays of each site. Raises OSError."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        names = []
        for site, arrays in parts:
            names.append(site)
            for part, values in arrays.items():
                _write(archive, f"{site}\n{part}", values)
        _write(archive, ABOUT, np.array(json.dumps({**about, "sites": names})))


def read_about(path: Path) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """What a file says, and the names of the arrays of each site. Raises what numpy, zipfile and json raise, and
    KeyError or ValueError when something is not there or not of the kind that it should be."""
    with np.load(path, allow_pickle=False) as file:
        about = json.loads(str(file[ABOUT]))
        parts: dict[str, list[str]] = {name: [] for name in about.pop("sites")}
        for key in file.files:
            if key != ABOUT:
                name, _, part = key.rpartition("\n")
                if part not in PARTS:
                    raise ValueError(f"it holds a {part!r}")
                parts[name].append(part)
    for name, own in parts.items():
        if ("low_a" in own) != ("low_b" in own):
            raise ValueError(f"of the low rank of {name!r} only one half is there")
    return about, parts


def read_parts(path: Path, site: str, parts: list[str]) -> dict[str, np.ndarray]:
    """The arrays of one site, read now."""
    with np.load(path, allow_pickle=False) as file:
        return {part: file[f"{site}\n{part}"] for part in parts}


def _write(archive: zipfile.ZipFile, name: str, values: np.ndarray) -> None:
    # a fixed date, so that the same content gives the same bytes
    with archive.open(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), "w", force_zip64=True) as member:
        np.lib.format.write_array(member, np.asarray(values), allow_pickle=False)

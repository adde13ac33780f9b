"""`Gradients`: how the loss depends on what the linear layers read, token by token, in one file."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nmonnx.errors import InputError, Unseen
from nmonnx.onnx_file.save import staging

SCHEMA_VERSION = 1
_KIND = "nmonnx activation gradients"


@dataclass(frozen=True, eq=False)
class SiteGradient:
    """x     [R, K] float16, the input of one linear layer in R tokens
    slope [R, K] float16, the gradient of the text's log-loss (the sum over its window) by x, in units of `unit`
    """

    x: np.ndarray
    slope: np.ndarray
    unit: float

    @classmethod
    def of(cls, x: np.ndarray, slope: np.ndarray) -> SiteGradient:
        """Values out of the range of float16 are clipped."""
        unit = float(np.abs(slope).max(initial=0)) or 1.0
        return cls(_half(x), _half(slope / unit), unit)


@dataclass(frozen=True, eq=False)
class Gradients:
    """sites     by site name
    source    `model_sha256` of the model
    protocol  what was run, in words
    """

    sites: Mapping[str, SiteGradient]
    source: str
    protocol: str

    def of(self, site: str) -> SiteGradient:
        """Raises Unseen when the site was not measured."""
        if site not in self.sites:
            raise Unseen(site, "its gradient was not measured")
        return self.sites[site]

    def save(self, path: str | Path) -> Path:
        """Write one .npz file. Raises ModelError when it cannot be written."""
        path = Path(path)
        head = {"kind": _KIND, "schema_version": SCHEMA_VERSION, "source": self.source, "protocol": self.protocol}
        about = {**head, "sites": {name: site.unit for name, site in self.sites.items()}}
        arrays = {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)}
        for number, site in enumerate(self.sites.values()):
            arrays |= {f"{number}.x": site.x, f"{number}.slope": site.slope}
        with staging(path) as staged:
            np.savez(staged.open(path), **arrays)  # type: ignore[arg-type]
        return path

    @classmethod
    def load(cls, path: str | Path) -> Gradients:
        """Raises InputError when the file is missing, damaged or something else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                about = json.loads(bytes(file["about"]))
                if (about["kind"], about["schema_version"]) != (_KIND, SCHEMA_VERSION):
                    raise ValueError("another kind of file")
                sites = {
                    name: SiteGradient(file[f"{number}.x"], file[f"{number}.slope"], float(unit))
                    for number, (name, unit) in enumerate(about["sites"].items())
                }
                return cls(sites, about["source"], about["protocol"])
        except FileNotFoundError as e:
            raise InputError(f"{path} does not exist; make it with 'nmonnx gradients'") from e
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as e:
            raise InputError(f"{path} holds no gradients; make it with 'nmonnx gradients'") from e


def _half(values: np.ndarray) -> np.ndarray:
    largest = np.finfo(np.float16).max
    return np.clip(values, -largest, largest).astype(np.float16)

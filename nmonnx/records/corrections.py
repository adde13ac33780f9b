"""`Corrections`: what fitting found for each layer, in one file: new weights, scales, biases and shifts to fold."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from nmonnx.errors import InputError
from nmonnx.onnx_file.save import staging
from nmonnx.records.corrections_file import read_about, read_parts, write_parts

_FORMAT = "nmonnx.corrections/1"


@dataclass(frozen=True, eq=False)
class Correction:
    """What makes up for the pruning of one layer y = x W + b. With P the prune, A and B `low`:

        y = nu (P(x - shift) (weight - A B) diag(scale)) + x A B + b + bias + shift (weight - A B) diag(scale)

    shift   [K], or None: what the treatment of the layer has, or nothing
    weight  [K, N], or None: the weight of the original
    scale   [N], or None: 1
    bias    [N], or None: 0. It comes on top of the layer's own bias, which no scale touches
    low     (A [K, r], B [r, N]), or None: 0

    All float32. Alanova et al., arXiv 2509.22166: L-PTS is `shift`, LS `scale`, output shift `bias`, R-Sparse `low`.
    """

    shift: np.ndarray | None = None
    weight: np.ndarray | None = None
    scale: np.ndarray | None = None
    bias: np.ndarray | None = None
    low: tuple[np.ndarray, np.ndarray] | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """What is given, by name; the parts of `low` as low_a and low_b."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "low"}
        named |= dict(zip(("low_a", "low_b"), self.low or (None, None), strict=True))
        return {name: values for name, values in named.items() if values is not None}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Correction:
        own = {name: np.asarray(values, np.float32) for name, values in arrays.items()}
        low = (own.pop("low_a"), own.pop("low_b")) if "low_a" in own else None
        return cls(low=low, **own)


@dataclass(frozen=True, eq=False)
class Corrections:
    """sites     by site name; a site that is not there stays as it is
    refused   sites whose correction was fitted but did not help on held-out tokens, with the figures
    source    `model_sha256` of the model
    recipe    the recipe that they were fitted for, as JSON (`Recipe.to_json`)
    protocol  what was fitted on which text, in words
    """

    sites: Mapping[str, Correction]
    source: str
    recipe: str
    protocol: str
    refused: Mapping[str, str] = field(default_factory=dict)
    prunes: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write one .npz file, a site at a time. Raises ModelError when it cannot be written."""
        path = Path(path)
        about = {key: getattr(self, key) for key in ("source", "recipe", "protocol")}
        about |= {"format": _FORMAT, "refused": dict(self.refused), "prunes": dict(self.prunes)}
        with staging(path) as staged:
            write_parts(staged.open(path), about, ((name, site.arrays()) for name, site in self.sites.items()))
        return path

    @classmethod
    def load(cls, path: str | Path) -> Corrections:
        """Read what `save` wrote; the arrays stay on disk until a site is asked for. Raises InputError when the file
        is missing, damaged or something else."""
        try:
            about, parts = read_about(Path(path))
            if about.pop("format") != _FORMAT:
                raise KeyError("format")
            return cls(_OnDisk(Path(path), parts), **about)
        except FileNotFoundError as e:
            raise InputError(f"{path} does not exist; make it with 'nmonnx fit'") from e
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as e:
            raise InputError(f"{path} holds no corrections, or is damaged; make them with 'nmonnx fit'") from e


def brief(reason: str) -> str:
    """Why a correction was refused, without the figures, so that layers with one reason can be counted."""
    said, figures, _ = reason.partition(" would be ")
    return f"{said} would be higher" if figures else said


class _OnDisk(Mapping[str, Correction]):
    """The sites of a file, each read anew when it is asked for."""

    def __init__(self, path: Path, parts: dict[str, list[str]]) -> None:
        self._path, self._parts = path, parts

    def __getitem__(self, name: str) -> Correction:
        parts = self._parts[name]
        try:
            return Correction.of_arrays(read_parts(self._path, name, parts))
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as e:
            raise InputError(f"{self._path}: the correction of layer {name!r} cannot be read ({e}); fit again") from e

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

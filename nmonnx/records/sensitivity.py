"""`Sensitivity`: what was measured, as a JSON file; `Checkpoint`: as much of it as there is while it is measured."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nmonnx.errors import InputError, UsageError
from nmonnx.onnx_file.save import staging
from nmonnx.onnx_file.tensors import why
from nmonnx.pattern import Pattern

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class SiteSensitivity:
    """kl     mean KL(dense || pruned) of the predictions, nats per token, when only `group` is pruned
    nll    increase of the mean negative log-likelihood of a token, nats
    group  names of the layers that read the same activation, this one included: they were pruned together
    role, block, k, n  as of the `Site`
    """

    kl: float
    nll: float
    group: tuple[str, ...]
    role: str
    block: int | None
    k: int
    n: int


@dataclass(frozen=True)
class Sensitivity:
    """source     `model_sha256` of the model
    pattern    what the activations were pruned to
    protocol   how it was measured, in words
    sites      what each linear layer costs, by its name, in the order of the graph
    """

    source: str
    pattern: Pattern
    protocol: str
    sites: dict[str, SiteSensitivity]

    def groups(self) -> list[SiteSensitivity]:
        """One entry for each pruned activation: its first layer's."""
        return [site for name, site in self.sites.items() if site.group[0] == name]

    def by_role(self) -> dict[str, tuple[int, float, float]]:
        """(activations, sum of kl, sum of nll) by the roles that share one, as in "q, k, v"; the largest kl first."""
        sums: dict[str, tuple[int, float, float]] = {}
        for group in self.groups():
            role = ", ".join(dict.fromkeys(self.sites[name].role for name in group.group))
            count, kl, nll = sums.get(role, (0, 0.0, 0.0))
            sums[role] = (count + 1, kl + group.kl, nll + group.nll)
        return dict(sorted(sums.items(), key=lambda item: -item[1][1]))

    def to_json(self) -> str:
        data = {
            "schema_version": SCHEMA_VERSION,
            "source": self.source,
            "pattern": str(self.pattern),
            "protocol": self.protocol,
            "sites": {name: asdict(site) for name, site in self.sites.items()},
        }
        return json.dumps(data, indent=1, ensure_ascii=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the JSON; a file that is there is replaced at the end. Raises ModelError when it cannot be written."""
        with staging(Path(path)) as staged:
            staged.open(Path(path)).write(self.to_json().encode())

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Raises InputError when the file is missing, damaged or something else."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as e:
            raise InputError(f"{path} cannot be read: {why(e)}; 'nmonnx sensitivity' writes it") from e
        except (ValueError, RecursionError) as e:
            raise InputError(f"{path} is not JSON or is damaged; let 'nmonnx sensitivity' write it again") from e
        version = data.get("schema_version") if isinstance(data, dict) else None
        if not isinstance(data, dict) or "sites" not in data or version is None:
            raise InputError(f"{path} is not a file of 'nmonnx sensitivity'")
        if version != SCHEMA_VERSION:
            raise InputError(f"{path}: schema_version {version!r}; this release reads {SCHEMA_VERSION}")
        try:
            return _read(data)
        except (KeyError, TypeError, ValueError, AttributeError, UsageError) as e:
            raise InputError(f"{path} is damaged ({e}); let 'nmonnx sensitivity' write it again") from e


class Checkpoint:
    """Numbers of the groups measured so far, on disk after each. One of other settings (`key`), or a damaged one, is
    started anew. With `path` None they are kept in memory only."""

    def __init__(self, path: Path | None, key: dict[str, Any]) -> None:
        self._path, self._key = path, key
        self._groups: dict[str, tuple[float, float]] = {}
        if path is not None and path.exists():
            self._groups = _stored(path, key)

    def get(self, group: Sequence[str]) -> tuple[float, float] | None:
        """(kl, nll) of a group of sites, None when it is still to be measured."""
        return self._groups.get(json.dumps(group))

    def put(self, group: Sequence[str], numbers: tuple[float, float]) -> None:
        """Raises ModelError when the file cannot be written."""
        self._groups[json.dumps(group)] = numbers
        if self._path is not None:
            with staging(self._path) as staged:
                staged.open(self._path).write(json.dumps({"key": self._key, "groups": self._groups}).encode())


def _stored(path: Path, key: dict[str, Any]) -> dict[str, tuple[float, float]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["key"] != key:
            return {}
        return {name: (_number(kl), _number(nll)) for name, (kl, nll) in data["groups"].items()}
    except OSError as e:
        raise InputError(f"{path} cannot be read: {why(e)}; remove it") from e
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def _read(data: dict[str, Any]) -> Sensitivity:
    sites = {name: _site(name, site) for name, site in data["sites"].items()}
    unknown = {other for site in sites.values() for other in site.group} - set(sites)
    if unknown:
        raise ValueError(f"layer {sorted(unknown)[0]!r} is in a group, but not measured")
    return Sensitivity(_text(data["source"]), Pattern.parse(_text(data["pattern"])), _text(data["protocol"]), sites)


def _site(name: str, data: dict[str, Any]) -> SiteSensitivity:
    group, block = tuple(_text(other) for other in data["group"]), data["block"]
    if name not in group:
        raise ValueError(f"layer {name!r} is not in its own group")
    sizes = (data["k"], data["n"], 0 if block is None else block)
    if any(type(size) is not int for size in sizes):
        raise ValueError(f"layer {name!r} has sizes that are no whole numbers")
    numbers = (_number(data["kl"]), _number(data["nll"]))
    return SiteSensitivity(*numbers, group, _text(data["role"]), block, data["k"], data["n"])


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} should be text")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} should be a finite number")
    return float(value)

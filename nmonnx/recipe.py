"""`Recipe`: what a conversion does, immutable, as JSON or YAML, stored in the converted model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from nmonnx.errors import InputError, UsageError
from nmonnx.pattern import Pattern

KERNELS = ("auto", "prune", "fused")
FALLBACKS = ("function", "none")
DEFAULT_PATTERN = Pattern(8, 16)
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """pattern   keep n of every m input channels of each chosen linear layer
    include   selectors of the layers to prune; empty: every one but lm_head
    exclude   selectors of layers to leave dense
    lm_head   prune lm_head too
    kernel    "auto": prune and multiply in one op where that pays; "fused": wherever it can be done;
              "prune": prune only, the linear layers stay as they are
    fallback  "function": embed the ops as model-local functions of stock ops, so that the file runs without
              the library; "none": do not
    """

    pattern: Pattern = DEFAULT_PATTERN
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    lm_head: bool = False
    kernel: str = "auto"
    fallback: str = "function"

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise UsageError(f"kernel {self.kernel!r} is not one of {', '.join(KERNELS)}")
        if self.fallback not in FALLBACKS:
            raise UsageError(f"fallback {self.fallback!r} is not one of {', '.join(FALLBACKS)}")

    def to_json(self) -> str:
        return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self), "pattern": str(self.pattern)})

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "recipe") -> Recipe:
        """Raises UsageError on an unknown key or a wrong value, naming it."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(str(k) for k in set(data) - known - {"schema_version"})
        if unknown:
            raise UsageError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
        if data.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
            raise UsageError(f"{where}: schema_version {data['schema_version']!r}; this release reads {SCHEMA_VERSION}")
        return cls(**{key: _value(key, value, where) for key, value in data.items() if key in known})

    @classmethod
    def read(cls, path: Path, flags: dict[str, Any] | None = None) -> Recipe:
        """Read a recipe from a .yaml or .json file; `flags` win over it. Raises InputError or UsageError."""
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as e:
            raise InputError(f"recipe {path} cannot be read: {str(e).splitlines()[0]}") from e
        if data is not None and not isinstance(data, dict):
            raise InputError(f"recipe {path} is not a mapping; write for example 'pattern: 8:16'")
        return cls.from_dict({**(data or {}), **(flags or {})}, str(path))


def _value(key: str, value: object, where: str) -> Any:
    """A value of a recipe in its proper type. Raises UsageError when it has another."""
    if key == "pattern":
        return Pattern.parse(_pattern_text(value))
    if key in ("include", "exclude"):
        selectors = [value] if isinstance(value, str) else value
        if not isinstance(selectors, (list, tuple)) or not all(isinstance(s, str) and s for s in selectors):
            raise UsageError(f"{where}: {key} must be a selector or a list of selectors, not {value!r}")
        return tuple(selectors)
    expected = bool if key == "lm_head" else str
    if not isinstance(value, expected):
        raise UsageError(f"{where}: {key} must be {'true or false' if expected is bool else 'a word'}, not {value!r}")
    return value


def _pattern_text(value: object) -> str:
    # YAML 1.1 reads an unquoted 8:16 as the base-60 number 496
    sixty = isinstance(value, int) and not isinstance(value, bool) and value >= 60
    return f"{value // 60}:{value % 60}" if sixty else str(value)  # type: ignore[operator]

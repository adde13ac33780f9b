"""`Grid`: recipes from every combination of choices, each once; combinations that cannot be, with the reason."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from nmonnx.errors import InputError, UnknownWord, UsageError
from nmonnx.pruning.presets import preset_named
from nmonnx.pruning.recipe import Recipe
from nmonnx.yaml_file import read_yaml

_NEUTRAL = ("act", "joint", "none", "uniform")
_KEYS = {
    "patterns": "pattern",
    "criteria": "criterion",
    "shares": "share",
    "orders": "order",
    "mitigations": "mitigations",
    "allocations": "allocate",
}


@dataclass(frozen=True)
class Grid:
    """Every combination of patterns, criteria, shares, orders, mitigations and allocations; every preset at every
    pattern; and recipes of one's own. Mitigations of one recipe are joined by "+"; "none" is none of them.

    base     entries that all of them have, such as {"include": ["down"]}
    recipes  whole recipes beside the grid; an entry `name` is what the table calls them
    """

    patterns: Sequence[Any] = ("8:16",)
    criteria: Sequence[str] = ("act",)
    shares: Sequence[str] = ("joint",)
    orders: Sequence[str] = ("none",)
    mitigations: Sequence[str] = ("none",)
    allocations: Sequence[str] = ("uniform",)
    presets: Sequence[str] = ()
    recipes: Sequence[Mapping[str, Any]] = ()
    base: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None, flags: Mapping[str, Sequence[str]]) -> Grid:
        """A grid from a .yaml or .json file with the names above as keys; `flags` win over it. Raises InputError when
        it cannot be read, UsageError for an unknown key or a value that is no list."""
        data = read_yaml(path, "grid") if path else {}
        if not isinstance(data or {}, dict):
            raise InputError(f'grid {path} is not a mapping; write for example \'patterns: ["8:16", "4:8"]\'')
        known = [f.name for f in fields(cls)]
        for key, value in (data or {}).items():
            if key not in known:
                raise UsageError(f"grid {path}: unknown key {key!r}; known are {', '.join(known)}")
            if not isinstance(value, dict if key == "base" else list):
                raise UsageError(f"grid {path}: {key} must be a {'mapping' if key == 'base' else 'list'}")
        return cls(**{**(data or {}), **flags})

    def combinations(self) -> list[tuple[str, dict[str, Any]]]:
        """(how it came about, without the pattern; entries of the recipe), in the order given."""
        found: list[tuple[str, dict[str, Any]]] = []
        for values in itertools.product(*(getattr(self, name) for name in _KEYS)):
            entries = dict(zip(_KEYS.values(), values, strict=True))
            words = [str(v) for v in values[1:] if v not in _NEUTRAL]
            found.append((" ".join(words), {**self.base, **entries}))
        for name, pattern in itertools.product(self.presets, self.patterns):
            found.append((name, {**self.base, **preset_named(name), "pattern": pattern}))
        for number, own in enumerate(self.recipes, 1):
            entries = {**self.base, **own}
            found.append((str(entries.pop("name", f"recipe {number}")), entries))
        return found

    def build(self, given: Sequence[str] = ()) -> tuple[dict[str, Recipe], dict[str, str]]:
        """(recipes by their labels, reasons by the labels of those that cannot be). `given`: which of "stats",
        "sensitivity", "gradients" and "fit-text" there are. Raises UsageError for an unknown preset, UnknownWord for a
        criterion, mitigation, order ... that there is not."""
        recipes: dict[str, Recipe] = {}
        impossible: dict[str, str] = {}
        seen: set[str] = set()
        for words, entries in self.combinations():
            try:
                recipe = Recipe.from_dict(_listed(entries), "grid")
            except UnknownWord:
                raise
            except UsageError as e:
                impossible[f"{entries.get('pattern', '')} {words}".strip()] = str(e)
                continue
            label = f"{recipe.pattern} {words}".strip()
            needs = (*recipe.needs, *(("fit-text",) if recipe.fitted else ()))
            missing = [f"--{need}" for need in needs if need not in given]
            if recipe.to_json() in seen:
                continue
            seen.add(recipe.to_json())
            if recipe.phase == "decode":
                impossible[label] = "perplexity is measured in calls of many tokens, which phase decode leaves dense"
            elif missing:
                impossible[label] = f"needs {' and '.join(missing)}"
            else:
                recipes[label] = recipe
        return recipes, impossible


def _listed(entries: dict[str, Any]) -> dict[str, Any]:
    """With mitigations as a list, not as the words of a flag."""
    words = entries.get("mitigations", ())
    listed = [part for part in words.split("+") if part != "none"] if isinstance(words, str) else words
    return {**entries, "mitigations": sorted(listed)}

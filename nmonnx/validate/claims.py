"""What a converted model says of itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import ModelProto

from nmonnx.digest import file_sha256
from nmonnx.errors import InputError, UsageError
from nmonnx.pattern import Pattern
from nmonnx.pruning.recipe import Recipe


@dataclass(frozen=True)
class Claim:
    """One linear layer as the conversion recorded it; `activation` and `output` are tensor names in `scope`, the
    activation is "" for a layer that was left. `weights` is the form in which its weight is stored, "" for that of the
    original, `weight_error` by how much that differs."""

    name: str
    op: str
    role: str
    block: int | None
    k: int
    n: int
    status: str
    scope: str
    output: str
    activation: str = ""
    pattern: str = ""
    kernel: str = ""
    reason: str = ""
    weights: str = ""
    weight_error: float | None = None

    @property
    def pruned(self) -> bool:
        return self.status == "pruned"


@dataclass(frozen=True)
class Declared:
    """A new constant that does something: `input` of an op, with values of this `sha256`, where the original has the
    tensor `replaces` ("": none)."""

    input: str
    sha256: str
    replaces: str


@dataclass(frozen=True)
class Claims:
    """changed: new initializer -> (original initializer, how it was made from it)
    constants: new constants that do something, by name
    fitted: layers whose correction was folded, with its parts"""

    recipe: Recipe
    sites: tuple[Claim, ...]
    changed: dict[str, tuple[str, str]]
    constants: dict[str, Declared]
    fitted: dict[str, list[str]]

    @property
    def pruned(self) -> list[Claim]:
        return [c for c in self.sites if c.pruned]

    @property
    def left(self) -> list[Claim]:
        return [c for c in self.sites if not c.pruned]


def read_claims(original: Path, before: ModelProto, converted: Path, after: ModelProto) -> Claims:
    """Read the metadata of `converted`. Raises InputError when it was not made by nmonnx, not from `original`, or when
    the two are swapped."""
    old, new = _metadata(before), _metadata(after)
    if "nmonnx.recipe" not in new:
        hint = "; the two files are swapped" if "nmonnx.recipe" in old else "; convert it with nmonnx first"
        raise InputError(f"{converted} carries no nmonnx.recipe, so it is not a converted model{hint}")
    if "nmonnx.recipe" in old:
        raise InputError(f"{original} is itself a converted model; give the model that {converted} was made from")
    _check_source(original, converted, new.get("nmonnx.source"))
    try:
        recipe = Recipe.from_dict(json.loads(new["nmonnx.recipe"]), str(converted))
        if recipe.prune == "weights":
            raise InputError(f"{converted} is a baseline with pruned weights; compare it with 'nmonnx evaluate'")
        sites = tuple(_claim(record) for record in json.loads(new["nmonnx.sites"]))
        changed = {k: (v["from"], v["how"]) for k, v in json.loads(new.get("nmonnx.changed", "{}")).items()}
        declared = json.loads(new.get("nmonnx.constants", "{}"))
        constants = {k: Declared(v["input"], v["sha256"], v["from"]) for k, v in declared.items()}
        fitted = dict(json.loads(new.get("nmonnx.fit", '{"sites": {}}'))["sites"])
    except (ValueError, KeyError, TypeError, AttributeError, UsageError) as e:
        raise InputError(
            f"{converted}: its nmonnx metadata cannot be read ({type(e).__name__}: {e}); convert it again"
        ) from e
    return Claims(recipe, sites, changed, constants, fitted)


def _metadata(proto: ModelProto) -> dict[str, str]:
    return {p.key: p.value for p in proto.metadata_props}


def _check_source(original: Path, converted: Path, source: str | None) -> None:
    found = file_sha256(original)
    if source and source != found:
        raise InputError(
            f"{converted} was made from a model with SHA-256 {source[:12]}..., but {original} has {found[:12]}...;"
            " give the file that was converted, unchanged"
        )


def _claim(record: dict[str, Any]) -> Claim:
    claim = Claim(**{key: record[key] for key in Claim.__dataclass_fields__ if key in record})
    if claim.status not in ("pruned", "left"):
        raise ValueError(f"site {claim.name!r} has status {claim.status!r}")
    if claim.pruned:
        Pattern.parse(claim.pattern)
        if not claim.activation:
            raise ValueError(f"pruned site {claim.name!r} has no activation")
    return claim

"""`convert`: one straight line from a model and a recipe to the sparse model on disk."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from nmonnx.errors import UsageError
from nmonnx.graph import load
from nmonnx.passes import PassResult, pipeline, run
from nmonnx.recipe import Recipe
from nmonnx.save import save
from nmonnx.sites import Found, Selection, converted_with, find_sites, select

SIDECARS = (
    "config.json",
    "generation_config.json",
    "genai_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""Files that a runtime looks for beside a model; they go along when the model is written to another folder."""


@dataclass(frozen=True)
class Conversion:
    """What `convert` did: the layers chosen and left, what each pass did, and the file (None for a dry run)."""

    source: Path
    recipe: Recipe
    found: Found
    selection: Selection
    passes: tuple[PassResult, ...]
    records: tuple[dict, ...]
    out: Path | None


def convert(source: str | Path, out: str | Path | None, recipe: Recipe, overwrite: bool = False) -> Conversion:
    """Write a copy of the model at `source` to `out` whose chosen linear layers prune their input. With `out` None
    nothing is written.

    Raises InputError when the source is not a usable model, UsageError when the recipe does not fit it or a file is
    in the way, ModelError when writing fails.
    """
    model = load(source)
    earlier = converted_with(model)
    if earlier:
        raise UsageError(f"{source} is converted already ({earlier}); convert the original model instead")
    found = find_sites(model)
    selection = select(found, recipe.include, recipe.exclude, recipe.lm_head)
    _refuse_nothing(model.path, found, selection)
    results = run(pipeline(recipe, selection.left), model, selection.chosen)
    records = tuple(json.loads(model.metadata["nmonnx.sites"]))
    written = save(model, out, overwrite) if out is not None else None
    if written is not None:
        _copy_sidecars(model.path, written)
    return Conversion(Path(source), recipe, found, selection, tuple(results), records, written)


def _refuse_nothing(path: Path, found: Found, selection: Selection) -> None:
    if selection.chosen:
        return
    linears = [s for s in selection.left if s.linear]
    if not linears and not found.sites:
        raise UsageError(f"{path}: no linear layer with a constant weight was found, so there is nothing to prune")
    reasons = sorted({s.reason for s in linears})
    raise UsageError(f"{path}: nothing to prune, all {len(linears)} linear layers are left: {'; '.join(reasons[:3])}")


def _copy_sidecars(source: Path, out: Path) -> None:
    if source.parent.resolve() == out.parent.resolve():
        return
    for name in SIDECARS:
        file, copy = source.parent / name, out.parent / name
        if file.is_file() and not copy.exists():
            shutil.copyfile(file, copy)
            if name == "genai_config.json":
                _point_genai(copy, source.name, out.name)


def _point_genai(config: Path, old: str, new: str) -> None:
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
        decoder = data["model"]["decoder"]
    except (ValueError, KeyError, TypeError):
        return
    if decoder.get("filename") == old:
        decoder["filename"] = new
        config.write_text(json.dumps(data, indent=4), encoding="utf-8")

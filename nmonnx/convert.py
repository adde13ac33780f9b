"""`convert`: one straight line from a model and a recipe to the sparse model on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nmonnx.errors import InputError, UsageError
from nmonnx.onnx_file.graph import Model, load
from nmonnx.onnx_file.identity import model_sha256
from nmonnx.onnx_file.save import save
from nmonnx.passes import PassResult, pipeline, run
from nmonnx.pruning.fit_match import check_fit, check_prunes, with_shifts
from nmonnx.pruning.recipe import Recipe
from nmonnx.pruning.treatment import Plan, plan
from nmonnx.sites import AT_RUN_TIME, Found, Selection, block_selectors, converted_with, find_sites, select

if TYPE_CHECKING:
    from nmonnx.records.corrections import Corrections
    from nmonnx.records.gradients import Gradients
    from nmonnx.records.sensitivity import Sensitivity
    from nmonnx.records.stats import Stats

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


_INLINE = "inline the functions first (onnx.inliner.inline_local_functions)"
_FIXES = {
    "BFLOAT16": "export in fp32 or fp16",
    "on the left": "export the layer as x @ W",
    "1x1 convolution": "export the layer as a MatMul or Gemm",
    "also a graph input": "take the weights off the list of graph inputs",
    "calls of its function": _INLINE,
    "by the caller of the function": _INLINE,
    "input of the graph or function": "export with the weights as initializers",
}
"""What mends a reason: a word of it, and the way."""


@dataclass(frozen=True)
class Conversion:
    """What `convert` did: the layers chosen and left, what each pass did, and the file (None for a dry run)."""

    source: Path
    recipe: Recipe
    found: Found
    selection: Selection
    plan: Plan
    passes: tuple[PassResult, ...]
    records: tuple[dict, ...]
    out: Path | None


def convert(
    source: str | Path,
    out: str | Path | None,
    recipe: Recipe,
    overwrite: bool = False,
    stats: Stats | None = None,
    sensitivity: Sensitivity | None = None,
    gradients: Gradients | None = None,
    fit: Corrections | None = None,
) -> Conversion:
    """Write a copy of the model at `source` to `out` whose chosen linear layers prune their input. With `out` None
    nothing is written. `stats`, `sensitivity` and `gradients` are what `recipe.needs` asks for, measured on `source`;
    `fit` is what `nmonnx fit` found for this model and recipe, and is folded.

    Raises InputError when the source is not a usable model, UsageError when the recipe does not fit it, when what it
    needs is missing or comes from another model, or a file is in the way, ModelError when writing fails.
    """
    model, done = rewrite(source, recipe, stats, sensitivity, gradients, fit)
    if out is None:
        return done
    return replace(done, out=save(model, out, overwrite, _sidecars(model.path, Path(out))))


def rewrite(
    source: str | Path,
    recipe: Recipe,
    stats: Stats | None = None,
    sensitivity: Sensitivity | None = None,
    gradients: Gradients | None = None,
    fit: Corrections | None = None,
) -> tuple[Model, Conversion]:
    """The edited model that `convert` writes, not written yet. Raises InputError and UsageError as `convert` does."""
    model = load(source)
    earlier = converted_with(model) or _recipe_in(model)
    if earlier:
        raise UsageError(f"{source} is converted already ({earlier}); convert the original model instead")
    found = find_sites(model)
    selection = selected(found, recipe)
    _refuse_nothing(model.path, found, selection)
    refuse_foreign(
        model.path, {"statistics": stats, "sensitivity": sensitivity, "gradients": gradients, "corrections": fit}
    )
    check_fit(recipe, fit)
    planned = plan(recipe, found, selection.chosen, stats, sensitivity, gradients)
    if fit is not None:
        check_prunes(planned, fit)
        planned = with_shifts(planned, fit, selection.chosen)
    results = run(pipeline(recipe, planned, selection.left, fit), model, selection.chosen)
    records = tuple(json.loads(model.metadata["nmonnx.sites"]))
    return model, Conversion(Path(source), recipe, found, selection, planned, tuple(results), records, None)


def selected(found: Found, recipe: Recipe) -> Selection:
    """The layers that a recipe prunes. Raises UsageError for a selector that matches nothing."""
    exclude = (*recipe.exclude, *block_selectors(found, recipe.dense_blocks))
    return select(found, recipe.include, exclude, recipe.lm_head)


def converted_records(model: Model) -> list[dict] | None:
    """What a converted model says of each linear layer of its original (`nmonnx.sites`); None for any other model."""
    stored = next((p.value for p in model.proto.metadata_props if p.key == "nmonnx.sites"), None)
    try:
        return json.loads(stored) if stored else None
    except ValueError as e:
        raise InputError(f"{model.path}: its metadata entry nmonnx.sites is damaged; convert the original again") from e


def refuse_converted(model: Model, action: str) -> None:
    """Raises UsageError for a converted model, whose inner tensors are not those of the original."""
    if converted_with(model) or converted_records(model) is not None:
        raise UsageError(f"{model.path} is converted already; {action} the original model instead")


def _recipe_in(model: Model) -> str:
    """The pattern that the metadata speaks of: the ops may have been inlined since."""
    recipe = next((p.value for p in model.proto.metadata_props if p.key == "nmonnx.recipe"), "")
    match = re.search(r'"pattern": "([^"]*)"', recipe)
    return match[1] if match else recipe[:40]


def _refuse_nothing(path: Path, found: Found, selection: Selection) -> None:
    if selection.chosen:
        return
    others = {s.reason for s in found.skipped if not s.linear and "weight" in s.reason} - {AT_RUN_TIME}
    seen = f"; of other products: {_mended(others)}" if others else ""
    linears = [s for s in selection.left if s.linear]
    if not linears:
        raise UsageError(
            f"{path}: no linear layer with a constant weight was found, so there is nothing to prune{seen}"
        )
    reasons = _mended({s.reason for s in linears})
    raise UsageError(f"{path}: nothing to prune, all {len(linears)} linear layers are left: {reasons}{seen}")


def refuse_foreign(path: Path, measured: Mapping[str, Stats | Sensitivity | Gradients | Corrections | None]) -> None:
    """Raises UsageError for what was measured on another model than that at `path`."""
    source = model_sha256(path) if any(m is not None for m in measured.values()) else ""
    for what, given in measured.items():
        if given is not None and given.source != source:
            raise UsageError(
                f"the {what} were measured on another model than {path}, whose graph or weights differ; measure again"
            )


def _mended(reasons: set[str]) -> str:
    """The reasons, with what to do about them."""

    def mended(reason: str) -> str:
        fix = next((fix for word, fix in _FIXES.items() if word in reason), "")
        return f"{reason} ({fix})" if fix else reason

    return "; ".join(mended(reason) for reason in sorted(reasons)[:3])


def _sidecars(source: Path, out: Path) -> dict[str, bytes]:
    """Contents of the small files that a runtime looks for beside the model, where `out` lies in another folder that
    has none of its own yet."""
    if source.parent.resolve() == out.parent.resolve():
        return {}
    found = {}
    for name in SIDECARS:
        file = source.parent / name
        if file.is_file() and not (out.parent / name).exists():
            found[name] = file.read_bytes()
    if "genai_config.json" in found:
        found["genai_config.json"] = _pointing_at(found["genai_config.json"], source.name, out.name)
    return found


def _pointing_at(config: bytes, old: str, new: str) -> bytes:
    try:
        data = json.loads(config)
        decoder = data["model"]["decoder"]
        if decoder.get("filename") != old:
            return config
    except (ValueError, KeyError, TypeError, AttributeError):
        return config
    decoder["filename"] = new
    return json.dumps(data, indent=4).encode()

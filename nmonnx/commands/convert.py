"""`nmonnx convert`: write the sparse model."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from nmonnx.commands.options import Exclude, Include, ModelPath, Overwrite, Quiet, ReportPath, Verbose, tell
from nmonnx.errors import UsageError
from nmonnx.pattern import Pattern
from nmonnx.presets import PRESETS, preset_named
from nmonnx.report import Report, check_format, table

if TYPE_CHECKING:
    from nmonnx.convert import Conversion
    from nmonnx.gradients import Gradients
    from nmonnx.sensitivity_record import Sensitivity
    from nmonnx.stats import Stats

PHASE_CALLS = {"prefill": "several tokens", "decode": "one token"}


def command(
    model: ModelPath,
    pattern: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--pattern", "-p", help="N:M, keep N of every M input channels; or a share kept, 50%. [default: 8:16]"
        ),
    ] = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="The file to write. [default: MODEL-8x16.onnx beside the model]"),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    dense_blocks: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Blocks to leave dense, such as first,last or 0,1,-1."),
    ] = None,
    lm_head: Annotated[bool, typer.Option("--lm-head", help="Prune the input of lm_head too.")] = False,
    criterion: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="What makes a channel worth keeping: act, wina, sqrt-wina, amber, amber-code, var-weight,"
            " clact-static, pcs, grad, random, clact, anti, or the path of an .npz with a vector for"
            " each layer. [default: act]"
        ),
    ] = None,
    scope: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="How a share is kept: by token, by call, or by a calibrated threshold. [default: token]"),
    ] = None,
    prune: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="activations; weights: prune these by magnitude instead, a baseline. [default: activations]"),
    ] = None,
    share: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="joint: layers on one activation share a prune; separate: one each. [default: joint]"),
    ] = None,
    order: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="deal: deal the channels over the groups by calibrated rms; swap: then part those wanted together;"
            " none. [default: none]"
        ),
    ] = None,
    mitigation: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="d-pts or d-pts-mean: move each token by its median or mean; s-pts (-median, -mode, -scalar,"
            " -scalar-mean, -scalar-mode): by calibrated values, folded into biases; var. Repeatable."
        ),
    ] = None,
    allocate: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="A kept N for each layer, same bytes: forward (by --sensitivity), fisher (by --gradients); or uniform."
            " [default: uniform]"
        ),
    ] = None,
    preset: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help=f"A named recipe: {', '.join(PRESETS)}; other flags win over it."),
    ] = None,
    stats: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="What 'nmonnx calibrate' saw on MODEL (.npz).", show_default=False),
    ] = None,
    sensitivity: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="What 'nmonnx sensitivity' measured on MODEL (.json).", show_default=False),
    ] = None,
    gradients: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="What 'nmonnx gradients' measured on MODEL (.npz).", show_default=False),
    ] = None,
    fit: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Corrections that 'nmonnx fit' found for MODEL (.npz); brings its recipe.", show_default=False
        ),
    ] = None,
    phase: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Prune only in prefill (calls of several tokens), only in decode, or both. [default: both]"),
    ] = None,
    dense_prefix: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Keep the first so many positions dense. [default: 0]"),
    ] = None,
    kernel: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="auto, fused (NMMatMul wherever possible) or prune (NMPrune only). [default: auto]"),
    ] = None,
    fallback: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="function (runs without the library too, slower) or none. [default: function]"),
    ] = None,
    config: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--config", "-c", help="A recipe in YAML or JSON; flags win over it."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Decide and report, write nothing.")] = False,
    overwrite: Overwrite = False,
    report: ReportPath = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Write a copy of MODEL whose linear layers prune their input activations to N:M at run time.

    N is the number KEPT: 4:16 keeps 4 of 16 (Wanda, SparseGPT and llm-compressor count the zeroed ones).
    """
    from nmonnx.convert import convert
    from nmonnx.corrections import Corrections
    from nmonnx.fit_match import recipe_of
    from nmonnx.recipe import Recipe

    check_format(report)
    flags: dict[str, Any] = {
        "pattern": pattern,
        "include": include,
        "exclude": exclude,
        "dense_blocks": _blocks(dense_blocks) if dense_blocks else None,
        "lm_head": lm_head or None,
        "criterion": criterion,
        "scope": scope,
        "prune": prune,
        "share": share,
        "order": order,
        "mitigations": mitigation,
        "allocate": allocate,
        "phase": phase,
        "dense_prefix": dense_prefix,
        "kernel": kernel,
        "fallback": fallback,
    }
    given = {key: value for key, value in flags.items() if value is not None and value != []}
    flags = {**preset_named(preset), **given} if preset else given
    found = Corrections.load(fit) if fit else None
    if found and not config and not preset:
        flags = {**recipe_of(found), **flags}
    recipe = Recipe.read(config, flags) if config else Recipe.from_dict(flags, "convert")
    if output is None:
        output = model.with_name(f"{model.stem}-{str(recipe.pattern).replace(':', 'x').replace('%', 'pct')}.onnx")
    if output.suffix != ".onnx":
        raise UsageError(f"--output {output}: the name must end in .onnx")
    measured = _measured(stats, sensitivity, gradients)
    done = convert(model, None if dry_run else output, recipe, overwrite, *measured, found)
    tell(conversion(done, verbose), report, quiet)


def _blocks(text: str) -> list[int]:
    words = {"first": "0", "last": "-1"}
    try:
        return [int(words.get(part.strip(), part)) for part in text.split(",")]
    except ValueError as e:
        raise UsageError(f"--dense-blocks {text!r}: give numbers, first or last, separated by commas") from e


def _measured(
    stats: Path | None, sensitivity: Path | None, gradients: Path | None
) -> tuple[Stats | None, Sensitivity | None, Gradients | None]:
    from nmonnx.gradients import Gradients
    from nmonnx.sensitivity_record import Sensitivity
    from nmonnx.stats import Stats

    return (
        Stats.load(stats) if stats else None,
        Sensitivity.load(sensitivity) if sensitivity else None,
        Gradients.load(gradients) if gradients else None,
    )


def conversion(done: Conversion, verbose: bool = False) -> Report:
    """What was pruned by which op, and what was left and why."""
    pruned = [r for r in done.records if r["status"] == "pruned"]
    left = [r for r in done.records if r["status"] == "left"]
    ops = Counter(r["kernel"] for r in pruned)
    how = " and ".join(f"{count} by {op}" for op, count in sorted(ops.items()))
    words = [f"{len(pruned)} of {len(done.records)} linear layers pruned to {done.recipe.pattern}: {how}."]
    words += _how_chosen(done, pruned)
    words += [f"Left dense: {_times(n)} {op}: {why}." for (op, why), n in _why_left(left).items()]
    words += [f"Skipped, not a linear layer: {n} {op}: {why}." for (op, why), n in _no_layers(done).items()]
    words += [f"Prune-only: {_times(n)}: {why}." for why, n in _why_not_fused(done).items()]
    words += [f"Note: {why}." for p in done.passes for where, why in p.left.items() if where == "model"]
    title = f"wrote {done.out}" if done.out else f"would convert {done.source} (dry run, nothing written)"
    groups = Counter((r["role"], r["op"], r["k"], r["n"], r["kernel"]) for r in pruned)
    by_role = table(
        "Pruned layers",
        ("role", "layers", "op", "K", "N", "now"),
        [(role, count, op, k, n, kernel) for (role, op, k, n, kernel), count in groups.items()],
    )
    each = table(
        "Layers",
        ("layer", "role", "K", "N", "now", "drops (as it lies, bound)"),
        [(r["name"], r["role"], r["k"], r["n"], _now(r), _drops(done, r["name"])) for r in done.records],
    )
    data = {
        "command": "convert",
        "output": str(done.out) if done.out else None,
        "recipe": json.loads(done.recipe.to_json()),
        "sites": list(done.records),
        "passes": [{"name": p.name, "changed": p.changed, "left": p.left, "bytes": p.bytes} for p in done.passes],
    }
    return Report(title, tuple(words), (each if verbose else by_role,), data, (done.source,))


def _how_chosen(done: Conversion, pruned: list[dict[str, Any]]) -> list[str]:
    """What differs from plain magnitude at one pattern."""
    recipe, words = done.recipe, []
    if recipe.prune == "weights":
        words.append(
            "A baseline: weights of small magnitude are 0 in the file, activations are dense, nothing is skipped."
        )
        lost = next(p for p in done.passes if p.name == "prune-weights").left
        words += [f"Left as it is: {name}: {why}." for name, why in lost.items()]
    if recipe.emulated:
        words.append(f"No kernel: {recipe.emulated} is made of stock operators, for research; it saves no time.")
    if recipe.scope != "token":
        words.append(f"The share is kept by {recipe.scope}.")
    if recipe.criterion != "act":
        words.append(f"Criterion {recipe.criterion}, {recipe.share} for the layers of one activation.")
    if recipe.mitigations:
        words.append(f"Mitigations: {', '.join(recipe.mitigations)}.")
    words += _how_corrected(done)
    words += _which_tokens(done)
    for what in ("shift", "center"):
        unfolded = _left_by(done, f"fold-{what}")
        words += [f"Without {what}: {_times(n)}: {why}." for why, n in unfolded.items()]
    if recipe.order != "none":
        words.append(_what_the_order_spares(done))
    patterns = Counter(r["pattern"] for r in pruned)
    if len(patterns) > 1:
        weights = sum(r["k"] * r["n"] for r in pruned)
        kept = {text: Pattern.parse(text) for text in patterns}
        read = sum(r["k"] * r["n"] * kept[r["pattern"]].n / kept[r["pattern"]].m for r in pruned)
        each = ", ".join(f"{p} ({c})" for p, c in sorted(patterns.items(), key=lambda i: kept[i[0]].n))
        words.append(f"Patterns: {each}; {100 * read / weights:.1f} % of the weights are read.")
    plain = Counter(done.plan.plain.values())
    words += [f"By plain magnitude: {_times(n)}: {why}." for why, n in plain.items()]
    return words


def _which_tokens(done: Conversion) -> list[str]:
    """Which tokens stay dense, and the layers that cannot know."""
    recipe, words = done.recipe, []
    if recipe.phase != "both":
        words.append(f"Pruned in {recipe.phase} only: calls with {PHASE_CALLS[recipe.phase]} in a row.")
    if recipe.dense_prefix:
        words.append(f"Dense: the tokens at the first {recipe.dense_prefix} positions.")
    untold = Counter(next(p for p in done.passes if p.name == "dense-tokens").left.values())
    return words + [f"In {_times(n)}: {why}." for why, n in untold.items()]


def _now(record: dict[str, Any]) -> str:
    pruned = f"{record['kernel']} {record['pattern']}" if record["status"] == "pruned" else ""
    return pruned or f"left: {record['reason']}"


def _drops(done: Conversion, name: str) -> str:
    spared = done.plan.lost.get(name)
    return f"{spared.order:.2%} ({spared.lie:.2%}, {spared.bound:.2%})" if spared else ""


def _what_the_order_spares(done: Conversion) -> str:
    lost = list(done.plan.lost.values())
    words = f"Groups are cut along an order of the channels ({done.recipe.order})"
    if not lost:
        return words + "."
    lie, order, bound = (100 * sum(values) / len(lost) for values in zip(*map(astuple, lost), strict=True))
    return (
        f"{words}: pruning drops {order:.2f} % of the squared scores of the calibration tokens, {lie:.2f} % as the"
        f" channels lie; no order drops less than {bound:.2f} % (unstructured). Mean over layers."
    )


def _how_corrected(done: Conversion) -> list[str]:
    from nmonnx.corrections import brief

    fold = next(p for p in done.passes if p.name == "fold-corrections")
    if not fold.changed and not fold.left:
        return []
    words = [f"Corrections folded: {_times(fold.changed)}; {fold.bytes:+,} bytes of weights."]
    return words + [f"Not folded: {_times(n)}: {why}." for why, n in Counter(map(brief, fold.left.values())).items()]


def _why_left(left: list[dict[str, Any]]) -> Counter[tuple[str, str]]:
    return Counter((r["op"], r["reason"]) for r in left)


def _no_layers(done: Conversion) -> Counter[tuple[str, str]]:
    return Counter((s.op, s.reason) for s in done.found.skipped if not s.linear)


def _why_not_fused(done: Conversion) -> Counter[str]:
    return _left_by(done, "fuse-matmul")


def _left_by(done: Conversion, name: str) -> Counter[str]:
    """Reasons of a pass, if it ran."""
    return Counter(why for p in done.passes if p.name == name for why in p.left.values())


def _times(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"

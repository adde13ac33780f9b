"""`nmonnx convert`: write the sparse model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from nmonnx.commands.conversion import conversion
from nmonnx.commands.options import (
    Exclude,
    GradientsPath,
    Include,
    ModelPath,
    Overwrite,
    Quiet,
    ReportPath,
    SensitivityPath,
    StatsPath,
    Verbose,
    beside,
    read_measured,
    tell,
)
from nmonnx.errors import UsageError
from nmonnx.pruning.presets import PRESETS, preset_named
from nmonnx.report import check_format


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
    stats: StatsPath = None,
    sensitivity: SensitivityPath = None,
    gradients: GradientsPath = None,
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
    from nmonnx.pruning.fit_match import recipe_of
    from nmonnx.pruning.recipe import Recipe
    from nmonnx.records.corrections import Corrections

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
        output = beside(model, f"-{str(recipe.pattern).replace(':', 'x').replace('%', 'pct')}.onnx")
    if output.suffix != ".onnx":
        raise UsageError(f"--output {output}: the name must end in .onnx")
    measured = read_measured(stats, sensitivity, gradients)
    done = convert(model, None if dry_run else output, recipe, overwrite, *measured, found)
    tell(conversion(done, verbose), report, quiet)


def _blocks(text: str) -> list[int]:
    words = {"first": "0", "last": "-1"}
    try:
        return [int(words.get(part.strip(), part)) for part in text.split(",")]
    except ValueError as e:
        raise UsageError(f"--dense-blocks {text!r}: give numbers, first or last, separated by commas") from e

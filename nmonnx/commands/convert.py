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
from nmonnx.commands.recipe_options import (
    Allocate,
    Config,
    Criterion,
    LmHead,
    Order,
    PatternFlag,
    Preset,
    Share,
    asked,
    made_of,
)
from nmonnx.errors import UsageError
from nmonnx.report import check_format


def command(
    model: ModelPath,
    pattern: PatternFlag = None,
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
    lm_head: LmHead = False,
    criterion: Criterion = None,
    scope: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="How a share is kept: by token, by call, or by a calibrated threshold. [default: token]"),
    ] = None,
    prune: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="activations; weights: prune these by magnitude instead, a baseline. [default: activations]"),
    ] = None,
    share: Share = None,
    order: Order = None,
    mitigation: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="d-pts or d-pts-mean: move each token by its median or mean; s-pts (-median, -mode, -scalar,"
            " -scalar-mean, -scalar-mode): by calibrated values, folded into biases; var. Repeatable."
        ),
    ] = None,
    allocate: Allocate = None,
    preset: Preset = None,
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
    weights: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Store the weights of the fused layers as fp16, int8 or int4, or keep them. [default: keep]"),
    ] = None,
    fallback: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="function (runs without the library too, slower) or none. [default: function]"),
    ] = None,
    config: Config = None,
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
        "weights": weights,
        "fallback": fallback,
    }
    entries = asked(flags, preset)
    found = Corrections.load(fit) if fit else None
    if found and not config and not preset:
        entries = {**recipe_of(found), **entries}
    recipe = made_of(entries, config, "convert")
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

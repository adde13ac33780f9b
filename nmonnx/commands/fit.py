"""`nmonnx fit`: find the constants that make up for the pruning, for `nmonnx convert --fit`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console

from nmonnx.commands.options import (
    Exclude,
    FeedFiles,
    GradientsPath,
    Include,
    ModelPath,
    Overwrite,
    Quiet,
    ReportPath,
    SensitivityPath,
    StatsPath,
    Threads,
    TokenizerPath,
    Verbose,
    beside,
    read_feed_files,
    read_measured,
    refuse_output,
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
from nmonnx.report import Report, check_format, table, tally

if TYPE_CHECKING:
    from nmonnx.records.corrections import Corrections


def command(
    model: ModelPath,
    text: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="The text to fit on, a UTF-8 file. Not one that you will measure on."),
    ] = None,
    tokenizer: TokenizerPath = None,
    feeds: FeedFiles = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="The file to write. [default: MODEL-fit.npz beside the model]"),
    ] = None,
    config: Config = None,
    preset: Preset = None,
    mitigation: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="bias, output-scale, least-squares, static-var, r-sparse, bias1, bias2; learned: l-pts, output-shift,"
            " ls, r-sparse-learned, distil. Repeatable."
        ),
    ] = None,
    pattern: PatternFlag = None,
    criterion: Criterion = None,
    share: Share = None,
    order: Order = None,
    allocate: Allocate = None,
    lm_head: LmHead = False,
    include: Include = None,
    exclude: Exclude = None,
    stats: StatsPath = None,
    sensitivity: SensitivityPath = None,
    gradients: GradientsPath = None,
    window: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=2, help="Tokens of a window, each read from an empty cache. [default: 1024; learned: 512]"),
    ] = None,
    max_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=2, help="Tokens to read, at most. [default: the whole text]"),
    ] = None,
    rank: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Rank of r-sparse and r-sparse-learned. [default: 64]"),
    ] = None,
    ridge: Annotated[float, typer.Option(help="Pull of least-squares towards the original weight.")] = 1.0,
    hold_out: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Share of the windows to judge corrections on. [default: 0.2; learned: 0.1]"),
    ] = None,
    regime: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Learned: by-layers, each block for itself, or end-to-end (default of distil)."),
    ] = None,
    windows: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Learned: windows to train on, at most. [default: 256; distil: 120]"),
    ] = None,
    epochs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Learned: how often. [default: 1]"),
    ] = None,
    lr: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Learned: rate of AdamW. [default: 0.0001; distil: 0.0002]"),
    ] = None,
    memory: Annotated[int, typer.Option(min=1, help="MiB of sums held at a time, about.")] = 1024,
    threads: Threads = 0,
    overwrite: Overwrite = False,
    report: ReportPath = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Run MODEL, as exported, over a text and write the constants that make up for its pruning.

    Some are computed, others learned with PyTorch (a text is needed). A correction that does not lower the error of
    its layer on held-out windows is refused and told; what is learned is judged by what it is learned by. A run that
    was cut short goes on where it was when it is started again.
    """
    from nmonnx.fitting.fit import Fit, fit
    from nmonnx.fitting.learned import Learning
    from nmonnx.inference.text import encode, load_tokenizer, read_text
    from nmonnx.progress import progress_bar
    from nmonnx.pruning.mitigations import LEARNED

    check_format(report)
    if (text is None) == (not feeds):
        raise UsageError("give a text (--text FILE) or feeds (--feeds FILE), one of them")
    flags: dict[str, Any] = {
        "pattern": pattern,
        "criterion": criterion,
        "share": share,
        "order": order,
        "allocate": allocate,
        "lm_head": lm_head or None,
        "include": include,
        "exclude": exclude,
        "mitigations": mitigation,
        "rank": rank,
    }
    recipe = made_of(asked(flags, preset), config, "fit")
    out = output or beside(model, "-fit.npz")
    refuse_output(out, ".npz", overwrite, [*(feeds or []), *filter(None, (stats, sensitivity, gradients))])
    learning_flags = {"--regime": regime, "--windows": windows, "--epochs": epochs, "--lr": lr}
    if not set(recipe.fitted) & set(LEARNED):
        for flag, value in learning_flags.items():
            if value is not None:
                raise UsageError(f"{flag} is for mitigations that are learned: {', '.join(LEARNED)}")
    how = Fit(window or 1024, max_tokens, ridge, 0.2 if hold_out is None else hold_out, memory << 20, threads)
    learning = Learning(regime, epochs, lr, window, windows, hold_out)
    tokens = encode(load_tokenizer(tokenizer, beside=model), read_text(text)) if text else None
    seen, weighed, slopes = read_measured(stats, sensitivity, gradients)
    words = Console(stderr=True)
    with progress_bar(words, "fitting", disable=quiet or not words.is_terminal) as progress:
        found = fit(
            model,
            recipe,
            out,
            tokens,
            read_feed_files(model, feeds) if feeds else None,
            how,
            progress,
            text.name if text else "",
            learning,
            stats=seen,
            sensitivity=weighed,
            gradients=slopes,
        )
    tell(fitted(out, model, found, verbose), report, quiet)


def fitted(out: Path, model: Path, found: Corrections, verbose: bool = False) -> Report:
    """What was fitted, and what was refused with its figures."""
    from nmonnx.records.corrections import brief

    total = len(found.sites) + len(found.refused)
    words = [f"{len(found.sites)} of {total} layers corrected; {found.protocol}."]
    kinds = Counter(map(brief, found.refused.values()))
    words += tally("Refused: ", kinds)
    rows = list(found.refused.items())
    tables = (table("Refused layers", ("layer", "why"), rows if verbose else rows[:20]),) if rows else ()
    data = {
        "command": "fit",
        "output": str(out),
        "protocol": found.protocol,
        "corrected": list(found.sites),
        "refused": dict(found.refused),
    }
    return Report(f"wrote {out}", tuple(words), tables, data, (model,))

"""`nmonnx calibrate`: statistics of what the linear layers read, for passes that correct or weight the pruning."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console

from nmonnx.commands.options import (
    FeedFiles,
    ModelPath,
    Overwrite,
    Quiet,
    Threads,
    TokenizerPath,
    beside,
    read_feed_files,
    refuse_output,
    tell,
)
from nmonnx.errors import UsageError
from nmonnx.report import Report, table, tally

if TYPE_CHECKING:
    from nmonnx.records.stats import Stats
    from nmonnx.sites import Site


def command(
    model: ModelPath,
    text: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="The text to run on, a UTF-8 file. Not one that you will measure on."),
    ] = None,
    tokenizer: TokenizerPath = None,
    feeds: FeedFiles = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="The file to write. [default: MODEL-stats.npz beside the model]"),
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window, each read from an empty cache.")] = 1024,
    max_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=2, help="Tokens to read, at most. [default: the whole text]"),
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="Tokens whose activations are kept as they are.")] = 512,
    jobs: Annotated[int, typer.Option(min=1, help="Parts of the text to run at a time; each needs the memory.")] = 1,
    backend: Annotated[str, typer.Option(help="loky (processes), dask or ray.")] = "loky",
    scheduler: Annotated[str, typer.Option(help="Address of a running Dask scheduler or Ray cluster.")] = "",
    threads: Threads = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Run MODEL, as exported, over a text and write what its linear layers read: mean, rms, largest, a sample.

    A run that was cut short goes on where it was when it is started again. With --jobs or a --backend a text is cut
    into shards of 16 windows, which several processes or machines run; the statistics are the same.
    """
    from nmonnx.calibration.calibrate import calibrate
    from nmonnx.calibration.shards import calibrate_shards
    from nmonnx.inference.text import encode, load_tokenizer, read_text
    from nmonnx.onnx_file.graph import load
    from nmonnx.parallel import Workers
    from nmonnx.progress import progress_bar
    from nmonnx.sites import find_sites

    if (text is None) == (not feeds):
        raise UsageError("give a text (--text FILE) or feeds (--feeds FILE), one of them")
    workers = Workers(backend, jobs, scheduler)
    if feeds and not workers.alone:
        raise UsageError("feeds are run one by one; --jobs and --backend are for a text")
    out = output or beside(model, "-stats.npz")
    refuse_output(out, ".npz", overwrite, feeds or [])
    sites = find_sites(load(model)).sites
    tokens = encode(load_tokenizer(tokenizer, beside=model), read_text(text)) if text else None
    parts = out.with_name(f"{out.stem}.parts")
    words = Console(stderr=True)
    with progress_bar(words, "calibrating", disable=quiet or not words.is_terminal) as progress:
        if tokens is not None and not workers.alone:
            where = (parts, workers, window, max_tokens, sample, threads, progress)
            stats = calibrate_shards(model, tokens, *where, label=text.name if text else "")
        else:
            stats = calibrate(
                model,
                tokens,
                read_feed_files(model, feeds) if feeds else None,
                window,
                max_tokens,
                sample,
                threads,
                out.with_name(f"{out.stem}.partial.npz"),
                progress,
                label=text.name if text else "",
            )
    stats.save(out)
    shutil.rmtree(parts, ignore_errors=True)
    tell(calibration(out, stats, sites), None, quiet)


FEW = 256
"""Tokens below which statistics are told to be poor."""


def calibration(out: Path, stats: Stats, sites: tuple[Site, ...]) -> Report:
    """What was seen, by role."""
    groups = Counter((s.role, s.k, stats.seen[s.name].tokens) for s in sites if s.name in stats.seen)
    rows = [(role, count, k, tokens) for (role, k, tokens), count in groups.items()]
    words = [f"{len(stats.seen)} of {len(sites)} layers seen; {stats.protocol}."]
    words += tally("Not seen: ", Counter(stats.unseen.values()))
    scarce = Counter(
        f"{s.tokens} tokens, too few to tell much; give more" for s in stats.seen.values() if s.tokens < FEW
    )
    words += tally("Little seen: ", scarce)
    return Report(str(out), tuple(words), (table("Layers seen", ("role", "layers", "K", "tokens"), rows),))

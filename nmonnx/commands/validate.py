"""`nmonnx validate`: a converted model against its original."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console

from nmonnx.commands.options import Quiet, ReportPath, Threads, Verbose, read_feed_files, tell
from nmonnx.errors import UsageError
from nmonnx.report import Report, check_format, table

if TYPE_CHECKING:
    from nmonnx.validate import Report as Validation

Limit = Optional[float]  # noqa: UP045


def command(
    original: Annotated[Path, typer.Argument(help="The model as exported.", show_default=False)],
    converted: Annotated[Path, typer.Argument(help="What `nmonnx convert` made of it.", show_default=False)],
    feeds: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help="Input arrays: .npz or a folder of .npy, named as the inputs. Repeatable. [default: made]"),
    ] = None,
    tokenizer: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="tokenizer.json, for --text. [default: beside ORIGINAL]"),
    ] = None,
    text: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Also compare the perplexity on this text file."),
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a perplexity window.")] = 512,
    max_windows: Annotated[int, typer.Option(min=1, help="Perplexity windows, at most.")] = 8,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the greedy continuations.")] = 16,
    max_abs: Annotated[Limit, typer.Option(help="Most absolute error of the logits (or outputs).")] = None,
    max_mean_abs: Annotated[Limit, typer.Option(help="Most mean absolute error.")] = None,
    max_relative: Annotated[Limit, typer.Option(help="Most relative error, by norms.")] = None,
    max_kl: Annotated[Limit, typer.Option(help="Most KL divergence of the predictions, nats.")] = None,
    max_ppl_ratio: Annotated[Limit, typer.Option(help="Most perplexity, in units of the original's.")] = None,
    min_snr: Annotated[Limit, typer.Option(help="Least signal-to-noise ratio, dB.")] = None,
    min_cosine: Annotated[Limit, typer.Option(help="Least cosine similarity.")] = None,
    min_top1: Annotated[Limit, typer.Option(help="Least share of equal first predictions.")] = None,
    min_top5: Annotated[Limit, typer.Option(help="Least overlap of the five first predictions.")] = None,
    min_greedy: Annotated[Limit, typer.Option(help="Least share of equal greedy continuation.")] = None,
    min_kept_energy: Annotated[Limit, typer.Option(help="Least share of energy that each layer keeps.")] = None,
    fit: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="The corrections that were folded: measure each layer against them, not folded."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the made inputs.")] = 0,
    threads: Threads = 0,
    report: ReportPath = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Prove what the conversion left alone and measure what it changed. Exit code 1 when a check or a limit fails."""
    from nmonnx.inference.text import load_tokenizer, read_text
    from nmonnx.records.corrections import Corrections
    from nmonnx.validate import Language, Thresholds, validate

    check_format(report)
    limits = Thresholds(
        max_abs=max_abs,
        mean_abs=max_mean_abs,
        relative=max_relative,
        kl=max_kl,
        ppl_ratio=max_ppl_ratio,
        snr_db=min_snr,
        cosine=min_cosine,
        top1=min_top1,
        top5=min_top5,
        greedy=min_greedy,
        kept_energy=min_kept_energy,
    )
    if max_ppl_ratio is not None and text is None:
        raise UsageError("--max-ppl-ratio needs a text to measure on; give --text FILE")
    words = load_tokenizer(tokenizer, beside=original) if text or tokenizer else None
    with Console(stderr=True).status("reading") as status:
        say: Callable[[str], None] = lambda what: status.update(what)  # noqa: E731
        done = validate(
            original,
            converted,
            read_feed_files(original, feeds) if feeds else None,
            Language(words, read_text(text) if text else None, new_tokens, window, max_windows),
            limits,
            threads,
            seed,
            say,
            Corrections.load(fit) if fit else None,
        )
    tell(validation(done, verbose), report, quiet)
    if not done.passed:
        raise typer.Exit(1)


def validation(done: Validation, verbose: bool = False) -> Report:
    """The checks, and the layers: one by one, or only the ones that keep least."""
    failed = [c for c in done.checks if not c.passed]
    words = [f"{len(done.checks)} checks on {', '.join(done.feeds) or 'the files alone'}: " + _verdict(len(failed))]
    words += [f"Not measured: {what}: {why}." for what, why in done.skipped]
    unseen = Counter(s.note for s in done.sites if s.status == "pruned" and s.kept_energy is None)
    words += [
        f"Not measured: {count} pruned layers: {note or 'no feed reached them'}." for note, count in unseen.items()
    ]
    checks = table("Checks", ("check", "measured", "limit", "", "detail"), done.rows())
    columns = ("layer", "role", "pattern", "kernel", "kept energy", "density", "error", "propagated", "note")
    sites = table("Layers" if verbose else "Layers that keep least energy", columns, _sites(done, verbose))
    data = {"command": "validate", **done.data()}
    title = f"{done.converted} against {done.original}"
    return Report(title, tuple(words), (checks, sites), data, (done.original, done.converted))


def _verdict(failed: int) -> str:
    return f"{failed} FAILED." if failed else "all passed."


def _sites(done: Validation, verbose: bool) -> list[tuple[str, ...]]:
    rows = done.site_rows()
    if verbose:
        return rows
    measured = [(s.kept_energy, row) for s, row in zip(done.sites, rows, strict=True) if s.kept_energy is not None]
    return [row for _, row in sorted(measured, key=lambda pair: pair[0])[:5]]

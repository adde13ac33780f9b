"""`nmonnx bench`: how fast a model is beside another, and why."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console

from nmonnx.commands.options import Quiet, Verbose, tell
from nmonnx.errors import UnknownWord, UsageError
from nmonnx.parallel import INSTALL
from nmonnx.report import FORMATS, Report, Table, can_plot, check_place, counted, table, to_html, to_json, write

if TYPE_CHECKING:
    from nmonnx.bench.bench import Bench
    from nmonnx.bench.result import Result

PICTURES = (".png", ".svg")
_LAYERS = 8


def command(
    dense: Annotated[Path, typer.Argument(help="The model to compare with.", show_default=False)],
    sparse: Annotated[Path, typer.Argument(help="The model to measure, for example its conversion.")],
    threads: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Intra-op threads, separated by commas; by default 1 and all cores."),
    ] = None,
    tokens: Annotated[str, typer.Option(help="Tokens of a call, separated by commas.")] = "1,4,16,64,256",
    past: Annotated[str, typer.Option(help="Tokens in the cache before it, separated by commas.")] = "0,256",
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Paired rounds; an interval needs 6.")] = 15,
    profile: Annotated[int, typer.Option(min=0, help="Calls of each kind to profile; 0: none.")] = 3,
    loads: Annotated[int, typer.Option(min=0, help="Fresh processes that load each model; 0: none.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead of tables.")] = False,
    report: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help="Also write .json, .md or .html, or a plot: .png, .svg. Repeatable."),
    ] = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Time SPARSE beside DENSE in paired rounds; where the time goes, weights read, load time and memory."""
    from nmonnx.bench.bench import Plan, bench
    from nmonnx.bench.machine import cores

    places = report or []
    for path in places:
        check_place("--report", path, (*FORMATS, *PICTURES))
        if path.suffix in PICTURES and not can_plot():
            raise UsageError(f"--report {path}: a plot needs matplotlib; install it with {INSTALL}")
    counts = _numbers("--threads", threads) if threads else tuple(sorted({1, cores()}))
    plan = Plan(counts, _numbers("--tokens", tokens), _numbers("--past", past), rounds, profile, loads)
    with Console(stderr=True).status("reading") as status:
        done = bench(dense, sparse, plan, lambda what: status.update(what))
    told = benchmark(done, verbose)
    if any(path.suffix == ".html" for path in places) and not can_plot():
        told = replace(told, words=(*told.words, f"No plot in the report: matplotlib is not installed; {INSTALL}."))
    if as_json:
        sys.stdout.write(to_json(told))
    tell(told, None, quiet or as_json)
    for path in places:
        _write(path, told, done)


def benchmark(done: Bench, verbose: bool = False) -> Report:
    """Tables of the times, the weights, the loading, and of the first case by operator and by layer."""
    rounds = len(done.results[0].times)
    about = f"Medians of {counted(rounds, 'paired round')}; a ratio below 1: sparse is faster."
    if done.results[0].interval is None:
        about += " An interval needs 6 rounds or more."
    machine = ", ".join(f"{b / 1e9:.1f} GB/s with {counted(t, 'thread')}" for t, b in done.memory.items())
    words = [about, f"This machine reads {machine}.", *done.notes]
    first = done.results[0]
    tables = [_times(done), _weights(done), _loading(done)]
    if first.profiles:
        tables += [_operators(first), _roles(done, first), _layers(done, first, verbose)]
    title = f"{done.paths[1]} (sparse) beside {done.paths[0]} (dense)"
    return Report(title, tuple(words), tuple(tables), {"command": "bench", **done.data()}, done.paths)


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as e:
        raise UnknownWord(f"{flag} {text!r} is no list of whole numbers; write for example 1,2") from e


def _times(done: Bench) -> Table:
    columns = (
        "threads",
        "past",
        "tokens",
        "dense ms",
        "sparse ms",
        "dense tokens/s",
        "sparse tokens/s",
        "sparse / dense",
    )
    rows = []
    for r in done.results:
        speeds = (*(f"{1e3 * s:.4g}" for s in r.seconds), *(f"{rate:.4g}" for rate in r.rates))
        between = f"{r.interval.low:.3f} to {r.interval.high:.3f}" if r.interval else "-"
        rows.append((r.case.threads, r.case.past, r.case.tokens, *speeds, f"{r.ratio:.3f}", between))
    return table("Time of a call", (*columns, "95 % interval"), rows)


def _weights(done: Bench) -> Table:
    columns = ("threads", "past", "tokens", "dense MB a token", "sparse MB a token", "skipped", "dense GB/s")
    rows = []
    for r in done.results:
        tokens, (dense, sparse), stored = r.case.tokens, r.read, done.stored[1]
        skipped = f"{100 * (stored - sparse) / stored:.1f} %" if stored else "-"
        read = (f"{dense / tokens / 1e6:.4g}", f"{sparse / tokens / 1e6:.4g}", skipped)
        rates = (*r.bandwidth, done.memory[r.case.threads])
        rows.append((r.case.threads, r.case.past, tokens, *read, *(f"{rate / 1e9:.1f}" for rate in rates)))
    return table(
        "Weights of the linear layers that are read (of several tokens: at most)",
        (*columns, "sparse GB/s", "machine GB/s"),
        rows,
    )


def _loading(done: Bench) -> Table:
    columns = ("model", "linear layers", "weights MB", "load s", "peak RSS MB", "of it before")
    rows = []
    for at, found in enumerate(done.loadings):
        memory = (f"{found.peak / 1e6:.0f}", f"{found.before / 1e6:.0f}")
        weights = (len(done.layers[at].linear), f"{done.stored[at] / 1e6:.4g}")
        rows.append((done.paths[at].name, *weights, f"{found.seconds:.3f}", *memory))
    return table("Loading, each time in a process of its own", columns, rows)


def _operators(first: Result) -> Table:
    assert first.profiles is not None
    dense, sparse = (p.by_op for p in first.profiles)
    names = sorted({*dense, *sparse}, key=lambda op: -dense.get(op, 0.0) - sparse.get(op, 0.0))
    rows = [(op, *_pair(dense.get(op), sparse.get(op))) for op in names]
    return table(f"Time by operator, {first.case}", ("operator", "dense ms", "sparse ms", "ratio"), rows)


def _roles(done: Bench, first: Result) -> Table:
    assert first.profiles is not None
    sums: list[dict[str, float]] = [{}, {}]
    for total, profile in zip(sums, first.profiles, strict=True):
        for site, seconds in profile.by_site.items():
            role = done.roles.get(site, "other")
            total[role] = total.get(role, 0.0) + seconds
    rows = [(role, *_pair(*(total.get(role) for total in sums))) for role in dict.fromkeys((*sums[0], *sums[1]))]
    return table(f"Time of the linear layers, {first.case}", ("role", "dense ms", "sparse ms", "ratio"), rows)


def _layers(done: Bench, first: Result, verbose: bool) -> Table:
    assert first.profiles is not None
    dense, sparse = (p.by_site for p in first.profiles)
    names = list(dict.fromkeys((*dense, *sparse)))
    if not verbose:
        names = sorted(names, key=lambda site: -sparse.get(site, 0.0))[:_LAYERS]
    rows = [(site, *_pair(dense.get(site), sparse.get(site))) for site in names]
    title = "Time by layer" if verbose else "The layers that take longest in sparse"
    return table(f"{title}, {first.case}", ("layer", "dense ms", "sparse ms", "ratio"), rows)


def _pair(dense: float | None, sparse: float | None) -> tuple[str, str, str]:
    times = ("-" if seconds is None else f"{1e3 * seconds:.3f}" for seconds in (dense, sparse))
    return *times, f"{sparse / dense:.2f}" if dense and sparse else "-"  # type: ignore[return-value]


def _write(path: Path, report: Report, done: Bench) -> None:
    """A report, an HTML file with the plot in it, or the plot alone."""
    from nmonnx.onnx_file.save import staging

    if path.suffix not in (*PICTURES, ".html") or not can_plot():
        write(report, path)
        return
    from nmonnx.bench.plot import plot

    picture = io.BytesIO()
    plot(done, picture, "png" if path.suffix == ".png" else "svg")
    content = picture.getvalue()
    if path.suffix == ".html":
        drawing = content.decode().partition("<svg")
        content = to_html(report).replace("</body>", f"{drawing[1]}{drawing[2]}</body>").encode()
    with staging(path) as staged:
        staged.open(path).write(content)

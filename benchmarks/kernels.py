"""Speed of the custom ops against ONNX Runtime's own kernels, in one process, round by round.

    python benchmarks/kernels.py table --report table.md        every target of the project, with what bounds it
    python benchmarks/kernels.py matmul --form int4 --shapes 2048x2048 --tokens 1,8,64 --threads 1,2
    python benchmarks/kernels.py prune --channels 2048 --tokens 1,64,16384
    python benchmarks/kernels.py thresholds --form fp32         from how many tokens on panels beat rows

Rounds alternate A B B A; a figure is the median of the rounds, a ratio the median of the rounds' ratios, below 1 where
the custom op is faster. Weights are cold: a session holds more of them than any cache, different in every layer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime
import typer
from kernel_layers import Layers, activations, numbers, prune_session, shapes
from rich.console import Console

from nmonnx.bench import machine
from nmonnx.bench.rounds import median_interval, paired
from nmonnx.pattern import Pattern
from nmonnx.report import Report, Table, show, table, write

COLD_BYTES = 160 << 20
"""Of the weights of a session."""

FEW_LAYERS = 6
"""Of a session for many tokens, where the time is that of the arithmetic."""

MANY_TOKENS = 12
SIZES = "576x1536,2048x2048,2048x8192,8192x2048,4096x4096,4096x11008"

app = typer.Typer(add_completion=False, help=__doc__)
Shapes = Annotated[str, typer.Option(help="KxN, ...")]
Patterns = Annotated[str, typer.Option(help="N:M, ...")]
Tokens = Annotated[str, typer.Option(help="Tokens of a call, ...")]
Threads = Annotated[str, typer.Option(help="Threads, ...")]
Rounds = Annotated[int, typer.Option(help="Paired rounds.")]
Form = Annotated[str, typer.Option(help="fp32, fp16, int8 or int4.")]
ReportFile = Annotated[Path | None, typer.Option("--report", help="Also write .md, .json or .html.")]


@dataclass(frozen=True)
class Target:
    """The ratio that products of some kind must reach, and the one aimed at; `best` on a CPU with the faster dense
    kernels (AVX-512 for float32, VNNI for whole numbers), where they differ."""

    form: str
    pattern: str
    tokens: tuple[int, ...]
    must: float
    aim: float
    best: tuple[float, float] | None = None


_MIDDLE = (2, 3, 4, 6, 8, 12, 16, 24, 31)
TARGETS = (
    Target("fp32", "8:16", (1,), 0.50, 0.42),
    Target("fp32", "4:16", (1,), 0.30, 0.22),
    Target("fp16", "8:16", (1,), 0.35, 0.25),
    Target("int8", "8:16", (1,), 0.65, 0.50, (0.45, 0.38)),
    Target("int8", "4:16", (1,), 0.40, 0.28, (0.27, 0.21)),
    Target("int4", "8:16", (1,), 0.70, 0.55, (0.42, 0.34)),
    Target("int4", "4:16", (1,), 0.50, 0.33, (0.26, 0.20)),
    Target("fp32", "8:16", _MIDDLE, 1.00, 0.85, (1.00, 0.75)),
    Target("int4", "8:16", _MIDDLE, 1.00, 0.80, (0.60, 0.42)),
    Target("fp32", "8:16", (64,), 0.90, 0.80, (0.82, 0.64)),
    Target("fp32", "8:16", (256,), 0.75, 0.63, (0.85, 0.68)),
    Target("fp32", "4:16", (64,), 0.70, 0.55),
    Target("fp32", "4:16", (256,), 0.45, 0.36),
    Target("int4", "8:16", (256,), 0.85, 0.70, (0.55, 0.42)),
    Target("int4", "4:16", (256,), 0.55, 0.38, (0.42, 0.30)),
)

HEAD = ("weights", "K,N", "pattern", "T", "threads", "dense us", "sparse us", "ratio", "95 % interval")


@app.command("table")
def whole(
    sizes: Shapes = SIZES,
    threads: Threads = "1,2",
    rounds: Rounds = 11,
    forms: Annotated[str, typer.Option(help="Forms of the weights to measure.")] = "fp32,fp16,int8,int4",
    report: ReportFile = None,
) -> None:
    """Every target, at every size."""
    console, rows, pruned = Console(stderr=True), [], []
    asked = [target for target in TARGETS if target.form in forms.split(",")]
    for count in numbers(threads):
        bandwidth = machine.read_bandwidth(count)
        for k, n in shapes(sizes):
            for row in _targets(k, n, count, rounds, asked, bandwidth):
                console.print(" ".join(row), highlight=False)
                rows.append(row)
            pruned += [_whole_prune(k, n, count, rounds, tokens) for tokens in (1, 64)]
    beyond = [[*row, "1.50", "1.10"] for row in _prunes([2048], [Pattern(8, 16)], [16384], rounds, 1)]
    tables = (
        *_by_size(rows),
        table("Products", (*HEAD, "bound", "must", "aim", "holds"), rows),
        table("Prune alone, then the dense product", (*HEAD, "must", "aim"), pruned),
        table("NMPrune and a copy of a tensor larger than the cache", (*_PRUNE_HEAD, "must", "aim"), beyond),
    )
    about = (
        "bound: what one token reads, at the bandwidth of this machine, over the time of the dense kernel.",
        "Dense: MatMul in float32; MatMulNBits of accuracy level 4 for int8 and int4.",
    )
    _tell("Kernels beside ONNX Runtime's own", (_machine(), *about), tables, report)


@app.command()
def matmul(
    form: Form = "fp32",
    sizes: Annotated[str, typer.Option("--shapes", help="KxN, ...")] = "576x1536,2048x2048,2048x8192,4096x4096",
    patterns: Patterns = "8:16",
    tokens: Tokens = "1,2,4,8,16,24,64,256",
    threads: Threads = "1",
    rounds: Rounds = 15,
    report: ReportFile = None,
) -> None:
    """The fused op beside the dense one."""
    rows = []
    for count in numbers(threads):
        for k, n in shapes(sizes):
            wanted = [(Pattern.parse(p), t) for p in patterns.split(",") for t in numbers(tokens)]
            for pattern, t, times in _measure(k, n, form, wanted, count, rounds):
                rows.append(_row(form, k, n, str(pattern), t, count, times))
    _tell("Products", (_machine(),), (table("Products", HEAD, rows),), report)


@app.command()
def thresholds(
    form: Form = "fp32",
    sizes: Annotated[str, typer.Option("--shapes", help="KxN, ...")] = "576x1536,2048x2048,2048x8192",
    pattern: Annotated[str, typer.Option(help="N:M")] = "8:16",
    tokens: Tokens = "2,4,5,6,8,10,12,16,24,32,48,64,128",
    rounds: Rounds = 11,
) -> None:
    """Rows beside panels, as the attribute `panel_tokens` forces them, and what the table in custom_ops/src/product.cc
    takes, which may be dot products of whole units too."""
    rows = []
    for k, n in shapes(sizes):
        layers = Layers(k, n, form, _count(k, n, form, 1))
        ways = [layers.sparse(1, Pattern.parse(pattern), panel_tokens) for panel_tokens in (1 << 20, 2, 0)]
        for t in numbers(tokens):
            times = _times(ways, activations(t, k), rounds)
            panels, taken = np.median(times[:, 1:] / times[:, :1], axis=0)
            rows.append([form, f"{k},{n}", pattern, str(t), f"{panels:.2f}", f"{taken:.2f}"])
    head = ("weights", "K,N", "pattern", "T", "panels / rows", "by the table / rows")
    _tell("Rows and panels", (_machine(),), (table("Rows and panels", head, rows),), None)


_PRUNE_HEAD = ("K", "pattern", "T", "copy us", "Abs us", "NMPrune us", "of Abs", "of copy")


@app.command()
def prune(
    channels: Annotated[str, typer.Option(help="Channels, ...")] = "2048",
    patterns: Patterns = "2:4,8:16,16:32",
    tokens: Tokens = "1,64,1024,16384",
    threads: Annotated[int, typer.Option(help="Threads.")] = 1,
    rounds: Rounds = 15,
    report: ReportFile = None,
) -> None:
    """NMPrune beside ONNX Runtime's Abs (one pass over the same tensor) and a plain copy."""
    asked = [Pattern.parse(p) for p in patterns.split(",")]
    rows = list(_prunes(numbers(channels), asked, numbers(tokens), rounds, threads))
    _tell("Pruning alone", (_machine(),), (table("Pruning alone", _PRUNE_HEAD, rows),), report)


def _targets(
    k: int, n: int, threads: int, rounds: int, targets: Sequence[Target], bandwidth: float
) -> Iterator[list[str]]:
    """A row for each target that one size is measured against."""
    for form in dict.fromkeys(target.form for target in targets):
        own = {(t.pattern, tokens): t for t in targets if t.form == form for tokens in t.tokens}
        wanted = [(Pattern.parse(pattern), tokens) for pattern, tokens in own]
        for pattern, tokens, times in _measure(k, n, form, wanted, threads, rounds):
            target = own[str(pattern), tokens]
            must, aim = target.best if target.best and _has(form) else (target.must, target.aim)
            ratio, _ = _ratio(times)
            bound = Layers(k, n, form, 1).read_bytes(pattern) / bandwidth / float(np.median(times[:, 0]))
            row = _row(form, k, n, str(pattern), tokens, threads, times)
            yield [*row, f"{bound:.2f}" if tokens == 1 else "", f"{must:.2f}", f"{aim:.2f}", _holds(ratio, must, aim)]


def _by_size(rows: Sequence[Sequence[str]]) -> Iterator[Table]:
    """The ratios with the sizes side by side, a table for each number of threads; of one token with the bound."""
    sizes = list(dict.fromkeys(row[1] for row in rows))
    for threads in dict.fromkeys(row[4] for row in rows):
        cells: dict[tuple[str, ...], dict[str, str]] = {}
        for row in (row for row in rows if row[4] == threads):
            bound = f" ({row[9]})" if row[9] else ""
            cells.setdefault((row[0], row[2], row[3], *row[10:12]), {})[row[1]] = row[7] + bound
        lines = [
            [form, pattern, tokens, *(found.get(size, "") for size in sizes), must, aim]
            for (form, pattern, tokens, must, aim), found in cells.items()
        ]
        yield table(
            f"Sparse over dense, {threads} thread(s); in brackets the bound",
            ("weights", "pattern", "T", *sizes, "must", "aim"),
            lines,
        )


def _holds(ratio: float, must: float, aim: float) -> str:
    return "aim" if ratio <= aim else "must" if ratio <= must else "no"


def _has(form: str) -> bool:
    """Whether the CPU has the instructions that make the dense kernels faster."""
    flags = machine.flags()
    return ("avx512_vnni" if form in ("int8", "int4") else "avx512f") in flags


def _measure(
    k: int, n: int, form: str, wanted: Sequence[tuple[Pattern, int]], threads: int, rounds: int
) -> Iterator[tuple[Pattern, int, np.ndarray]]:
    """Seconds of a dense and a sparse layer, [rounds, 2], for each pattern and number of tokens."""
    for many in (False, True):
        own = [(pattern, tokens) for pattern, tokens in wanted if (tokens >= MANY_TOKENS) is many]
        if not own:
            continue
        layers = Layers(k, n, form, _count(k, n, form, MANY_TOKENS if many else 1))
        dense = layers.dense(threads)
        for pattern in dict.fromkeys(pattern for pattern, _ in own):
            sparse = layers.sparse(threads, pattern)
            for tokens in [t for p, t in own if p == pattern]:
                yield pattern, tokens, _times([dense, sparse], activations(tokens, k), rounds) / layers.count


def _count(k: int, n: int, form: str, tokens: int) -> int:
    size = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5}[form] * k * n
    cold = max(2, -(-COLD_BYTES // int(size)))
    return min(cold, FEW_LAYERS) if tokens >= MANY_TOKENS else cold


def _times(sessions: Sequence[onnxruntime.InferenceSession], x: np.ndarray, rounds: int) -> np.ndarray:
    return paired([partial(session.run, None, {"x": x}) for session in sessions], rounds)


def _ratio(times: np.ndarray) -> tuple[float, str]:
    ratios = times[:, 1] / times[:, 0]
    interval = median_interval(ratios)
    return float(np.median(ratios)), f"{interval.low:.2f} to {interval.high:.2f}" if interval else ""


def _row(form: str, k: int, n: int, pattern: str, tokens: int, threads: int, times: np.ndarray) -> list[str]:
    ratio, interval = _ratio(times)
    dense, sparse = np.median(times, axis=0) * 1e6
    return [
        *(form, f"{k},{n}", pattern, str(tokens), str(threads)),
        *(f"{dense:.0f}", f"{sparse:.0f}", f"{ratio:.2f}", interval),
    ]


def _whole_prune(k: int, n: int, threads: int, rounds: int, tokens: int) -> list[str]:
    layers = Layers(k, n, "fp32", _count(k, n, "fp32", tokens))
    ways = [layers.dense(threads), layers.pruned(threads, Pattern(8, 16))]
    times = _times(ways, activations(tokens, k), rounds) / layers.count
    return [*_row("fp32", k, n, "8:16", tokens, threads, times), "1.05", "1.02"]


def _prunes(
    channels: Sequence[int], patterns: Sequence[Pattern], tokens: Sequence[int], rounds: int, threads: int
) -> Iterator[list[str]]:
    for k in channels:
        for pattern in patterns:
            for t in tokens:
                x = activations(t, k)
                y = np.empty_like(x)
                runs = [partial(np.copyto, y, x), *(_bound(p, x, threads) for p in (None, pattern))]
                times = paired(runs, rounds)
                copy, base, ours = np.median(times, axis=0) * 1e6
                of_base, of_copy = np.median(times[:, 2:] / times[:, 1::-1], axis=0)
                figures = (f"{copy:.1f}", f"{base:.1f}", f"{ours:.1f}", f"{of_base:.2f}", f"{of_copy:.2f}")
                yield [str(k), str(pattern), str(t), *figures]


def _bound(pattern: Pattern | None, x: np.ndarray, threads: int):  # type: ignore[no-untyped-def]
    """A run that does not allocate its output anew each time."""
    session = prune_session(pattern, threads)
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    binding.bind_ortvalue_output("y", onnxruntime.OrtValue.ortvalue_from_numpy(np.empty_like(x)))
    return partial(session.run_with_iobinding, binding)


def _machine() -> str:
    return f"{machine.cpu()}, {machine.cores()} cores, onnxruntime {onnxruntime.__version__}."


def _tell(title: str, words: Sequence[str], tables: Sequence, report: Path | None) -> None:  # type: ignore[type-arg]
    result = Report(title, tuple(words), tuple(tables))
    show(result, Console(width=None if sys.stdout.isatty() else 160))
    if report:
        write(result, report)


if __name__ == "__main__":
    app()

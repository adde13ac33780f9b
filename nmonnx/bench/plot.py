"""A picture of what was measured: ratio, tokens per second, where the time goes, bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, BinaryIO

from nmonnx.bench.result import NAMES, Bench, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("0.55", "C0")
_OPS = 6


def plot(done: Bench, file: BinaryIO, kind: str) -> None:
    """Draw it into `file`, svg or png. Needs matplotlib."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    (ratio, rate), (time, bandwidth) = figure.subplots(2, 2)
    figure.suptitle(f"{done.paths[1].name} (sparse) beside {done.paths[0].name} (dense)")
    lines = _lines(done.results)
    _ratios(ratio, lines)
    _rates(rate, lines)
    _times(time, done.results[0])
    _bandwidths(bandwidth, done)
    with rc_context({"svg.hashsalt": "nmonnx"}):
        figure.savefig(file, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)


def _lines(results: Sequence[Result]) -> dict[tuple[int, int], list[Result]]:
    """The cases that differ in their tokens alone, by threads and past, in the order of their tokens."""
    lines: dict[tuple[int, int], list[Result]] = {}
    for result in sorted(results, key=lambda r: (r.case.threads, r.case.past, r.case.tokens)):
        lines.setdefault((result.case.threads, result.case.past), []).append(result)
    return lines


def _ratios(axes: Axes, lines: dict[tuple[int, int], list[Result]]) -> None:
    for number, ((threads, past), results) in enumerate(lines.items()):
        x, y = [r.case.tokens for r in results], [r.ratio for r in results]
        between = [(i.low, i.high) if (i := r.interval) else (r.ratio, r.ratio) for r in results]
        errors = [[v - low for v, (low, _) in zip(y, between, strict=True)]]
        errors.append([high - v for v, (_, high) in zip(y, between, strict=True)])
        label = f"threads {threads}, past {past}"
        axes.errorbar(x, y, errors, fmt="o-", color=f"C{number}", capsize=3, label=label)
    axes.axhline(1, color="0.7", linewidth=1)
    _token_axis(axes, lines)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("time, sparse / dense")
    axes.set_title("Median ratio of paired rounds, with its 95 % interval", fontsize=10)
    axes.legend(fontsize=8)


def _rates(axes: Axes, lines: dict[tuple[int, int], list[Result]]) -> None:
    from matplotlib.ticker import LogLocator

    for number, ((threads, past), results) in enumerate(lines.items()):
        x = [r.case.tokens for r in results]
        for column, (name, style) in enumerate(zip(NAMES, ("--", "-"), strict=True)):
            label = f"{name}, threads {threads}, past {past}"
            axes.plot(x, [r.rates[column] for r in results], f"o{style}", color=f"C{number}", ms=4, label=label)
    _token_axis(axes, lines)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_ylabel("tokens per second")
    axes.set_title("Speed", fontsize=10)
    axes.legend(fontsize=7)


def _token_axis(axes: Axes, lines: dict[tuple[int, int], list[Result]]) -> None:
    tokens = sorted({r.case.tokens for results in lines.values() for r in results})
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(t) for t in tokens])
    axes.minorticks_off()
    axes.set_xlabel("tokens of a call")


def _times(axes: Axes, first: Result) -> None:
    axes.set_title(f"Time by operator, {first.case}", fontsize=10)
    if first.profiles is None:
        axes.text(0.5, 0.5, "not profiled", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    shares = [profile.by_op for profile in first.profiles]
    total = {op: sum(s.get(op, 0.0) for s in shares) for op in {*shares[0], *shares[1]}}
    shown = sorted(total, key=lambda op: -total[op])[:_OPS]
    left = [0.0, 0.0]
    for number, op in enumerate((*shown, "other")):
        rest = [sum(v for k, v in s.items() if k not in shown) for s in shares]
        widths = [1e3 * w for w in (rest if op == "other" else [s.get(op, 0.0) for s in shares])]
        axes.barh(NAMES, widths, left=left, color=f"C{number}", label=op, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=3)


def _bandwidths(axes: Axes, done: Bench) -> None:
    """Of the smallest calls, by threads, beside what the machine reads."""
    first = {r.case.threads: r for r in reversed(done.results)}
    groups = sorted(first)
    for column, name in enumerate((*NAMES, "machine")):
        values = [(*first[t].bandwidth, done.memory[t])[column] / 1e9 for t in groups]
        places = [i + 0.27 * (column - 1) for i in range(len(groups))]
        colour = (*_COLOURS, "0.85")[column]
        axes.bar_label(axes.bar(places, values, 0.25, color=colour, label=name), fmt="%.1f", fontsize=8)
    axes.set_xticks(range(len(groups)), [str(first[t].case) for t in groups])
    axes.set_ylabel("GB/s")
    axes.set_title("Weights read, beside what the machine reads at most", fontsize=10)
    axes.margins(y=0.15)
    axes.legend(fontsize=8)

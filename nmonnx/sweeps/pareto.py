"""Results of a sweep beside the dense model, the Pareto front of weights read against loss, and its plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from nmonnx.evaluation.intervals import mean_error
from nmonnx.sweeps.sweep import Measured


@dataclass(frozen=True)
class Row:
    """A recipe beside the dense model.

    label             the recipe in short
    measured          its result
    difference        log-loss minus that of the dense model, nats for each token
    difference_error  its standard error from the differences of each window, None below two windows
    best              no other recipe reads as little with as low a loss, or better
    """

    label: str
    measured: Measured
    difference: float
    difference_error: float | None
    best: bool = False

    def data(self) -> dict[str, Any]:
        """All of it for JSON, flat."""
        own = asdict(self)
        return {**{k: v for k, v in own.items() if k != "measured"}, **own["measured"]}


def compare(dense: Measured, results: Mapping[str, Measured]) -> list[Row]:
    """The recipes against the dense model, the least read first, with the front marked."""
    rows = []
    for label, found in results.items():
        steps = [after - before for after, before in zip(found.window_nll, dense.window_nll, strict=True)]
        rows.append(Row(label, found, *mean_error(steps, found.window_tokens)))
    rows.sort(key=lambda row: (row.measured.kept, row.difference, row.label))
    front, lowest = [], float("inf")
    for row in rows:
        best = row.difference < lowest
        lowest = min(lowest, row.difference)
        front.append(Row(row.label, row.measured, row.difference, row.difference_error, best))
    return front


def plot(rows: Sequence[Row], files: Mapping[str, BinaryIO]) -> None:
    """Draw loss over share of weights read, with standard errors, the front joined. `files`: by
    format, svg or png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    front, others = [r for r in rows if r.best], [r for r in rows if not r.best]
    for group, colour, name in ((others, "0.6", "other recipes"), (front, "C0", "Pareto front")):
        if group:
            x = [100 * r.measured.kept for r in group]
            y, errors = [r.difference for r in group], [r.difference_error or 0.0 for r in group]
            axes.errorbar(x, y, errors, fmt="o-" if group is front else "o", color=colour, capsize=2, label=name)
    for row in front:
        at = (100 * row.measured.kept, row.difference)
        axes.annotate(row.label, at, xytext=(5, 5), textcoords="offset points", fontsize=7)
    axes.axhline(0, color="0.8", linewidth=1)
    axes.set_xlabel("weights of the linear layers read for a token, %")
    axes.set_ylabel("log-loss above dense, nats per token")
    axes.legend()
    for kind, file in files.items():
        figure.savefig(file, format=kind)

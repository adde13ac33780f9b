"""`nmonnx evaluate`: perplexity and tasks of several models, one row each."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console

from nmonnx.commands.options import Quiet, ReportPath, Threads, tell
from nmonnx.errors import UsageError
from nmonnx.report import Report, Table, check_format, table

if TYPE_CHECKING:
    from nmonnx.evaluation.evaluate import Evaluation, ModelScore, TextScore
    from nmonnx.evaluation.phases import Phase


def command(
    models: Annotated[
        list[Path], typer.Argument(help="The models; the others are compared with the first.", show_default=False)
    ],
    text: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Measure perplexity on this text file."),
    ] = None,
    tasks: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="A task of lm-evaluation-harness: its YAML file, or a name. Repeatable."),
    ] = None,
    tokenizer: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="tokenizer.json, or the folder it lies in. [default: beside the first model]"),
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 1024,
    stride: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Tokens from window to window. [default: the window]"),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows, at most.")] = 8,
    skip_windows: Annotated[int, typer.Option(min=0, help="Windows to leave out at the beginning.")] = 0,
    split: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Also: read so many tokens of a window with one model, go on with another."),
    ] = None,
    threads: Threads = 0,
    report: ReportPath = None,
    quiet: Quiet = False,
) -> None:
    """Perplexity, agreement and task accuracy of models beside the first one, with confidence intervals."""
    if text is None and not tasks:
        raise UsageError("nothing to measure on; give --text FILE, --tasks TASK.yaml or both")
    if split is not None and text is None:
        raise UsageError("--split divides the windows of a text; give --text FILE")
    check_format(report)
    from nmonnx.evaluation.evaluate import evaluate
    from nmonnx.evaluation.phases import phases
    from nmonnx.inference.text import encode, load_tokenizer, read_text

    tokens = encode(load_tokenizer(tokenizer, beside=models[0]), read_text(text)) if text else None
    with Console(stderr=True).status("reading") as status:

        def told(what: str, count: int, total: int) -> None:
            status.update(f"{what}, {count} of {total}")

        mixed: tuple[Phase, ...] = ()
        if split is not None and tokens is not None:
            mixed = phases(models, tokens, split, window, windows, skip_windows, threads, told)
        done = evaluate(
            models,
            tokens,
            window,
            stride,
            windows,
            skip_windows,
            threads,
            tasks,
            told,
            tokenizer,
        )
    tell(evaluation(done, text, mixed, split), report, quiet)


def evaluation(
    done: Evaluation, text: Path | None = None, mixed: tuple[Phase, ...] = (), split: int | None = None
) -> Report:
    """One row for each model; the tasks and the phases in tables of their own."""
    title = f"{len(done.models)} models" if len(done.models) > 1 else str(done.models[0].path)
    words = (*done.protocol, *((f"The text is {text.name}.",) if text else ()), *done.notes)
    data = {"command": "evaluate", **done.data(), "phases": [_phase(p, split) for p in mixed]}
    inputs = (*(m.path for m in done.models), *((text,) if text else ()))
    parts = [_texts(done)] if done.models[0].text else []
    parts += [_tasks(done)] if done.models[0].tasks else []
    parts += [_phases(mixed, split)] if mixed else []
    return Report(title, words, tuple(parts), data, inputs)


def _phase(phase: Phase, split: int | None) -> dict[str, object]:
    return {**asdict(phase), "split": split, "first": str(phase.first), "second": str(phase.second)}


def _phases(mixed: tuple[Phase, ...], split: int | None) -> Table:
    rows = [
        (p.first.name, p.second.name, f"{p.loss:.4f}", f"{p.difference:+.4f}{_error(p.error, 4)}" if n else "-")
        for n, p in enumerate(mixed)
    ]
    title = f"Log-loss behind the first {split} tokens of each window, by the models that read them and the rest"
    return table(title, ("first part", "rest", "log-loss", "difference"), rows)


def _texts(done: Evaluation) -> Table:
    columns = (
        *("model", "pattern", "perplexity", "95 % interval", "log-loss difference", "perplexity change"),
        "same best token",
    )
    rows = [(_name(m, done), m.pattern or "-", *_text(m.text, m is done.models[0])) for m in done.models if m.text]
    return table("Text", columns, rows)


def _text(score: TextScore, first: bool) -> tuple[str, ...]:
    between = f"{score.interval[0]:.2f} to {score.interval[1]:.2f}" if score.interval else "-"
    if first:
        return f"{score.perplexity.ppl:.2f}", between, "-", "-", "-"
    difference = f"{score.difference:+.4f}{_error(score.difference_error, 4)}"
    return (
        f"{score.perplexity.ppl:.2f}",
        between,
        difference,
        f"{100 * score.change:+.1f} %",
        f"{100 * score.agreement:.1f} %",
    )


def _tasks(done: Evaluation) -> Table:
    names = [f"{s.task}, {s.metric}" for s in done.models[0].tasks]
    rows = []
    for model in done.models:
        drop = model.drop
        cells = [f"{100 * s.value:.1f}{_error(s.error and 100 * s.error, 1)}" for s in model.tasks]
        average = f"{100 * drop.mean:.1f}{_error(drop.error and 100 * drop.error, 1)} %" if drop else "-"
        rows.append((_name(model, done), model.pattern or "-", *cells, average))
    return table("Tasks, %", ("model", "pattern", *names, "average relative drop"), rows)


def _name(model: ModelScore, done: Evaluation) -> str:
    """The file's name; its path where two models share the name."""
    shared = sum(m.path.name == model.path.name for m in done.models) > 1
    return str(model.path) if shared else model.path.name


def _error(error: float | None, digits: int) -> str:
    return "" if error is None else f" ± {error:.{digits}f}"

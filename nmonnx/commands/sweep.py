"""`nmonnx sweep`: many recipes of one model, measured side by side."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console

from nmonnx.commands.options import (
    GradientsPath,
    ModelPath,
    Quiet,
    ReportPath,
    SensitivityPath,
    StatsPath,
    TokenizerPath,
    tell,
)
from nmonnx.errors import InputError, RunError, UsageError
from nmonnx.parallel import INSTALL, Workers
from nmonnx.report import Report, can_plot, check_format, counted, table

if TYPE_CHECKING:
    from nmonnx.sweeps.pareto import Row
    from nmonnx.sweeps.search import Answer
    from nmonnx.sweeps.sweep import Measured


def command(
    model: ModelPath,
    text: Annotated[Path, typer.Option(help="The text to measure perplexity on, UTF-8.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for results, table and plot.")],
    tokenizer: TokenizerPath = None,
    patterns: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="N:M, several with commas: 2:4,4:8,8:16,16:32. [default: 8:16]"),
    ] = None,
    criteria: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="As --criterion of convert: act,amber. [default: act]"),
    ] = None,
    mitigations: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="none, or some joined by +: none,s-pts,var,s-pts+var. [default: none]"),
    ] = None,
    orders: Annotated[Optional[str], typer.Option(help="none,deal. [default: none]")] = None,  # noqa: UP045
    allocations: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="uniform,forward. [default: uniform]"),
    ] = None,
    shares: Annotated[Optional[str], typer.Option(help="joint,separate. [default: joint]")] = None,  # noqa: UP045
    presets: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Named recipes beside the grid, each at every pattern: best,paper-best."),
    ] = None,
    config: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--config", "-c", help="The grid in YAML: the lists above; base: entries of all; recipes: more."),
    ] = None,
    stats: StatsPath = None,
    sensitivity: SensitivityPath = None,
    gradients: GradientsPath = None,
    fit_text: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="The text to fit on, for mitigations that are fitted. Not that of --text."),
    ] = None,
    budget_loss: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0, help="Also search the cheapest recipe that loses at most so many nats a token."),
    ] = None,
    budget_ppl: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=1, help="The same, with a perplexity of at most this."),
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 1024,
    windows: Annotated[int, typer.Option(min=1, help="Windows, at most.")] = 8,
    skip_windows: Annotated[int, typer.Option(min=0, help="Windows to leave out at the beginning.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Recipes to measure at a time; each needs the model's memory.")] = 1,
    threads: Annotated[int, typer.Option(min=0, help="Intra-op threads of a job; 0: the cores / --jobs.")] = 0,
    backend: Annotated[str, typer.Option(help="loky (processes), dask or ray.")] = "loky",
    scheduler: Annotated[str, typer.Option(help="Address of a running Dask scheduler or Ray cluster.")] = "",
    report: ReportPath = None,
    quiet: Quiet = False,
) -> None:
    """Measure a grid of recipes of MODEL on a text: perplexity, loss above dense, weights read; with the Pareto front.

    Every combination of the lists is a recipe; those that cannot be are listed
    with the reason. Each recipe writes one file in OUTPUT/results: the same command
    goes on where it was interrupted, and more recipes can be added later.

    With a budget, kept N's for each layer by --sensitivity are measured too, until
    the recipe that reads the least within the budget is found; OUTPUT/recipe.yaml
    is that recipe, for 'nmonnx convert -c'.

    Results do not depend on the backend, for a fixed --threads. Workers on other
    machines need the same paths.
    """
    from nmonnx.inference.text import encode, load_tokenizer, read_text
    from nmonnx.progress import progress_bar
    from nmonnx.sweeps.grid import Grid
    from nmonnx.sweeps.pareto import compare
    from nmonnx.sweeps.search import search
    from nmonnx.sweeps.sweep import Job, protocol, run_jobs, sweep_folder

    lists = {
        "patterns": patterns,
        "criteria": criteria,
        "mitigations": mitigations,
        "orders": orders,
        "allocations": allocations,
        "shares": shares,
        "presets": presets,
    }
    flags = {name: [word.strip() for word in words.split(",")] for name, words in lists.items() if words is not None}
    files = {"stats": stats, "sensitivity": sensitivity, "gradients": gradients, "fit-text": fit_text}
    given = [name for name, path in files.items() if path]
    budget = budget_ppl if budget_ppl is not None else budget_loss
    if budget_ppl is not None and budget_loss is not None:
        raise UsageError("--budget-loss and --budget-ppl are two ways to say one thing; give one of them")
    if budget is not None and not (stats and sensitivity):
        raise UsageError("a budget needs --stats and --sensitivity; make them with nmonnx calibrate and sensitivity")
    recipes, impossible = Grid.read(config, flags).build(given)
    if not recipes:
        raise UsageError(f"no recipe of the grid can be: {'; '.join(f'{k}: {v}' for k, v in impossible.items())}")
    if not model.is_file():
        raise InputError(f"{model} does not exist or is no file; give the .onnx file")
    workers = Workers(backend, jobs, scheduler)
    words_of = load_tokenizer(tokenizer, beside=model)
    tokens = encode(words_of, read_text(text))
    fit_tokens = encode(words_of, read_text(fit_text)) if fit_text else None
    words = Console(stderr=True)
    with sweep_folder(output):
        check_format(report)  # which may lie in that folder
        cut = (window, windows, skip_windows, threads or workers.threads())
        how = protocol(model, tokens, output, stats, sensitivity, *cut, gradients, fit_tokens)
        dense = Job(how, None, output.absolute())
        wanted = {label: replace(dense, recipe=recipe) for label, recipe in recipes.items()}
        with (
            workers.open() as pool,
            progress_bar(words, "recipes", disable=quiet or not words.is_terminal) as step,
        ):
            found, failed = run_jobs([dense, *wanted.values()], pool, step)
            if dense not in found:
                raise RunError(f"the dense model could not be measured: {failed[dense]}")
            answer = None
            if budget is not None:
                answer = search(dense, found, recipes, budget, budget_ppl is not None, pool, step)
        labels = {label: found[job] for label, job in wanted.items() if job in found}
        impossible |= {label: f"failed: {failed[job]}" for label, job in wanted.items() if job in failed}
        labels |= answer.steps if answer else {}
        rows = compare(found[dense], labels)
        _write(output, rows, answer)
        tell(sweep(rows, found[dense], impossible, answer, output, (model, text)), report, quiet)
    if failed:
        raise RunError(f"{counted(len(failed), 'recipe')} could not be measured; the same command tries them again")


def sweep(
    rows: list[Row],
    dense: Measured,
    impossible: dict[str, str],
    answer: Answer | None,
    output: Path,
    inputs: tuple[Path, ...],
) -> Report:
    """One row for each recipe, the least read first; the Pareto front is marked."""
    recipes, predicted = counted(len(rows), "recipe"), sum(dense.window_tokens)
    words = [f"{recipes}; dense perplexity {dense.ppl:.2f}, {predicted} tokens predicted."]
    words.append(f"Text: {dense.protocol}; {dense.threads} threads. * no other recipe reads as little and loses less.")
    words += [f"Not run, {label}: {reason}." for label, reason in impossible.items()]
    if not can_plot():
        words.append(f"No plot: matplotlib is not installed; {INSTALL}.")
    if answer:
        words.append(answer.words(output / "recipe.yaml"))
    columns = ("", "recipe", "perplexity", "loss above dense, nats", "read of pruned layers", "read of all layers")
    cells = [
        (
            "*" if row.best else "",
            row.label,
            f"{row.measured.ppl:.2f}",
            f"{row.difference:+.4f}" + ("" if row.difference_error is None else f" ± {row.difference_error:.4f}"),
            f"{100 * row.measured.kept_pruned:.1f} %",
            f"{100 * row.measured.kept:.1f} %",
        )
        for row in rows
    ]
    data = {
        "command": "sweep",
        "dense": {"nll": dense.nll, "ppl": dense.ppl},
        "recipes": [row.data() for row in rows],
        "impossible": impossible,
        "answer": answer.label if answer else None,
    }
    return Report(f"wrote {output}", tuple(words), (table("Recipes", columns, cells),), data, inputs)


def _write(output: Path, rows: list[Row], answer: Answer | None) -> None:
    """results.csv, the plot, and the answer of a search."""
    from nmonnx.onnx_file.save import staging
    from nmonnx.sweeps.pareto import plot

    text = io.StringIO()
    names = ("recipe", "ppl", "nll", "difference", "difference_error", "kept_pruned", "kept", "pareto", "json")
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(names)
    for row in rows:
        m = row.measured
        shares = (m.kept_pruned, m.kept)
        lines.writerow(
            (row.label, m.ppl, m.nll, row.difference, row.difference_error, *shares, int(row.best), m.recipe)
        )
    with staging(output) as staged:
        staged.open(output / "results.csv").write(text.getvalue().encode())
        if answer and answer.yaml:
            staged.open(output / "recipe.yaml").write(answer.yaml.encode())
        if can_plot():
            plot(rows, {kind: staged.open(output / f"pareto.{kind}") for kind in ("svg", "png")})

"""`nmonnx sensitivity`: which layers cost most when they are pruned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from nmonnx.commands.options import (
    Exclude,
    Include,
    ModelPath,
    Overwrite,
    Quiet,
    ReportPath,
    Threads,
    TokenizerPath,
    Verbose,
    refuse_output,
    tell,
)
from nmonnx.report import Report, check_format, table

if TYPE_CHECKING:
    from nmonnx.records.sensitivity import Sensitivity

_TOP = 20


def command(
    model: ModelPath,
    text: Annotated[Path, typer.Option(help="The text to measure on, UTF-8.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .json file to write.")] = Path("sensitivity.json"),
    tokenizer: TokenizerPath = None,
    pattern: Annotated[str, typer.Option("--pattern", "-p", help="N:M, keep N of every M input channels.")] = "8:16",
    include: Include = None,
    exclude: Exclude = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    windows: Annotated[int, typer.Option(min=1, help="Windows, at most.")] = 2,
    threads: Threads = 0,
    overwrite: Overwrite = False,
    report: ReportPath = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Prune one activation of MODEL at a time and measure how much the predictions change.

    Layers that read one activation (q, k and v; gate and up) are pruned together. What is measured is kept beside the
    output (.partial.json) until the end: the same command goes on where it was interrupted.
    """
    from nmonnx.calibration.sensitivity import measure
    from nmonnx.inference.text import encode, load_tokenizer, read_text
    from nmonnx.progress import progress_bar
    from nmonnx.pruning.recipe import Recipe

    check_format(report)
    refuse_output(output, ".json", overwrite)
    recipe = Recipe.from_dict({"pattern": pattern, "include": include or [], "exclude": exclude or []}, "sensitivity")
    tokens = encode(load_tokenizer(tokenizer, beside=model), read_text(text))
    checkpoint = output.with_suffix(".partial.json")
    words = Console(stderr=True)
    with progress_bar(words, "pruning one activation at a time", disable=quiet or not words.is_terminal) as step:
        done = measure(model, recipe, tokens, window, windows, threads, checkpoint, step)
    done.save(output)
    checkpoint.unlink(missing_ok=True)
    tell(sensitivity(done, model, output, verbose), report, quiet)


def sensitivity(done: Sensitivity, model: Path, output: Path, verbose: bool = False) -> Report:
    """The activations that cost most (all of them with `verbose`), and sums by role."""
    groups = sorted(done.groups(), key=lambda group: -group.kl)
    words = [f"{len(groups)} activations of {len(done.sites)} layers, each pruned alone to {done.pattern}."]
    words += [f"Protocol: {done.protocol}. Nats per token."]
    shown = groups if verbose else groups[:_TOP]
    each = table(
        "Activations" if verbose or len(groups) <= _TOP else "Activations that cost most",
        ("layers", "role", "block", "K", "KL", "loss increase"),
        [
            (
                ", ".join(group.group),
                ", ".join(dict.fromkeys(done.sites[name].role for name in group.group)),
                "" if group.block is None else group.block,
                group.k,
                f"{group.kl:.5f}",
                f"{group.nll:+.5f}",
            )
            for group in shown
        ],
    )
    sums = [(role, count, f"{kl:.5f}", f"{nll:+.5f}") for role, (count, kl, nll) in done.by_role().items()]
    roles = table("Sums by role", ("role", "activations", "KL", "loss increase"), sums)
    data = {
        "command": "sensitivity",
        "output": str(output),
        "pattern": str(done.pattern),
        "protocol": done.protocol,
        "groups": [{"layers": g.group, "block": g.block, "kl": g.kl, "nll": g.nll} for g in groups],
        "roles": {role: {"activations": n, "kl": kl, "nll": nll} for role, (n, kl, nll) in done.by_role().items()},
    }
    return Report(f"wrote {output}", tuple(words), (each, roles), data, (model,))

"""`nmonnx demo`: the main job on a real language model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console

from nmonnx.commands.options import ReportPath, Threads, tell
from nmonnx.report import Report, check_format, table

if TYPE_CHECKING:
    from nmonnx.demo import Demo, Speed


def command(
    pattern: Annotated[str, typer.Option("--pattern", "-p", help="N:M, keep N of every M input channels.")] = "8:16",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the models.")] = Path("nmonnx-demo"),
    text: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Text for the perplexity. [default: a chapter of Northanger Abbey]"),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 1024 tokens of it.")] = 4,
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "The three most important inventions are",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to write.")] = 48,
    threads: Threads = 0,
    report: ReportPath = None,
) -> None:
    """Convert, validate and run SmolLM2-135M-Instruct (Apache-2.0), dense beside sparse."""
    from nmonnx.demo import run
    from nmonnx.pattern import Pattern
    from nmonnx.pruning.recipe import Recipe

    check_format(report)
    recipe = Recipe(Pattern.parse(pattern))
    done = run(output, recipe, text, windows, prompt, max_new_tokens, threads, Console(stderr=True))
    tell(demonstration(done, prompt), report)


def demonstration(done: Demo, prompt: str) -> Report:
    """Dense beside sparse, line by line."""
    dense, sparse = done.dense_perplexity, done.sparse_perplexity
    pruned = [r for r in done.conversion.records if r["status"] == "pruned"]
    rows = [
        ("linear layers pruned", "0", f"{len(pruned)} of {len(done.conversion.records)}", ""),
        ("perplexity", f"{dense.ppl:.2f}", f"{sparse.ppl:.2f}", f"{sparse.ppl / dense.ppl:.2f}"),
        ("tokens/s writing (decode)", *_rates(done.decode)),
        ("tokens/s reading (prefill of 256)", *_rates(done.prefill)),
    ]
    failed = [c.name for c in done.validation.checks if not c.passed]
    words = (
        f"Perplexity: {dense.protocol}.",
        f"Tokens per second: medians of {done.decode.rounds} rounds that alternate between the two.",
        f"Validation: {len(done.validation.checks)} checks, "
        + (f"failed: {', '.join(failed)}." if failed else "all invariants hold."),
        "Magnitude pruning alone costs a model this small much of its quality. That is plain N:M, without mitigation.",
        "",
        f"dense:  {prompt}{done.dense_text.text}",
        "",
        f"sparse: {prompt}{done.sparse_text.text}",
        "",
        f"The models are {done.dense} and {done.sparse}; try for example:",
        f"  nmonnx validate {done.dense} {done.sparse}",
        f"  nmonnx diff {done.dense} {done.sparse}",
        f'  nmonnx generate {done.sparse} --prompt "Once upon a time"',
    )
    title = f"SmolLM2-135M-Instruct, dense beside {done.conversion.recipe.pattern}"
    shown = table(title, ("", "dense", "sparse", "sparse / dense"), rows)
    data = {
        "command": "demo",
        "pattern": str(done.conversion.recipe.pattern),
        "perplexity": {"dense": dense.ppl, "sparse": sparse.ppl, "protocol": dense.protocol},
        "decode": asdict(done.decode),
        "prefill": asdict(done.prefill),
        "text": {"prompt": prompt, "dense": done.dense_text.text, "sparse": done.sparse_text.text},
        "models": {"dense": str(done.dense), "sparse": str(done.sparse)},
    }
    return Report(title, words, (shown,), data, (done.dense, done.sparse))


def _rates(speed: Speed) -> tuple[str, str, str]:
    return f"{speed.dense:.1f}", f"{speed.sparse:.1f}", f"{1 / speed.ratio:.2f}"

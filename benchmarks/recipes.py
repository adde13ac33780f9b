"""SmolLM2-135M by every kind of recipe: criteria, mitigations, order, allocation and the preset `best`, one protocol.

    nmonnx calibrate model.onnx --text wikitext2-valid.txt --max-tokens 32768 -o stats.npz
    nmonnx sensitivity model.onnx --text wikitext2-valid.txt --windows 2 -o sensitivity.json
    python benchmarks/recipes.py model.onnx --text wikitext2-test.txt --stats stats.npz --sensitivity sensitivity.json
    python benchmarks/recipes.py ... --recipes act,best --skip-windows 8 --windows 16

A recipe is a name of RECIPES, with @N:M behind it for another pattern than 8:16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nmonnx.convert import convert
from nmonnx.errors import NmonnxError
from nmonnx.evaluate import evaluate
from nmonnx.presets import PRESETS
from nmonnx.recipe import Recipe
from nmonnx.report import Report, show, table, write
from nmonnx.sensitivity_record import Sensitivity
from nmonnx.stats import Stats
from nmonnx.text import encode, load_tokenizer, read_text

CRITERIA = ("act", "wina", "sqrt-wina", "amber", "amber-code", "var-weight", "clact-static", "pcs", "random")
RECIPES: dict[str, dict[str, Any]] = {
    **{name: {"criterion": name} for name in CRITERIA},
    "sqrt-wina-separate": {"criterion": "sqrt-wina", "share": "separate"},
    "s-pts": {"mitigations": ["s-pts"]},
    "s-pts-scalar": {"mitigations": ["s-pts-scalar"]},
    "var": {"mitigations": ["var"]},
    "order": {"order": "deal"},
    "order-swap": {"order": "swap"},
    "allocate": {"allocate": "forward"},
    **PRESETS,
}


def main(
    model: Annotated[Path, typer.Argument(help="The dense model, with its tokenizer beside it.")],
    text: Annotated[Path, typer.Option(help="The text to measure on, not the one of the calibration.")],
    stats: Annotated[Path, typer.Option(help="What nmonnx calibrate saw.")],
    sensitivity: Annotated[Path, typer.Option(help="What nmonnx sensitivity measured.")],
    recipes: Annotated[str, typer.Option(help="Names of RECIPES, separated by commas.")] = ",".join(RECIPES),
    windows: Annotated[int, typer.Option(help="Windows of 1024 tokens.")] = 8,
    skip_windows: Annotated[int, typer.Option(help="Windows to leave out first.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads; 0: ONNX Runtime decides.")] = 0,
    report: Annotated[Path | None, typer.Option(help="Also write .md, .json or .html.")] = None,
) -> None:
    names = recipes.split(",")
    seen, weighed = Stats.load(stats), Sensitivity.load(sensitivity)
    paths = []
    for number, name in enumerate(names):
        base, _, pattern = name.partition("@")
        recipe = Recipe.from_dict({**RECIPES[base], "pattern": pattern or "8:16"}, name)
        paths.append(model.with_name(f"recipe-{number}.onnx"))
        convert(model, paths[-1], recipe, overwrite=True, stats=seen, sensitivity=weighed)
    ids = encode(load_tokenizer(beside=model), read_text(text))
    done = evaluate([model, *paths], ids, max_windows=windows, skip_windows=skip_windows, threads=threads)
    for path in paths:
        path.unlink()
    rows = []
    for name, score in zip(["dense", *names], done.models, strict=True):
        assert score.text is not None
        first = score is done.models[0]
        difference = "-" if first else f"{score.text.difference:+.3f} ± {score.text.difference_error or 0.0:.3f}"
        rows.append((name, f"{score.text.perplexity.ppl:.2f}", difference))
    words = (*done.protocol, f"{text.name}; all layers of every block, lm_head dense.")
    columns = ("recipe", "perplexity", "log-loss above dense, nats")
    result = Report("SmolLM2-135M, recipes side by side", words, (table("Recipes", columns, rows),))
    show(result, Console())
    if report:
        write(result, report)


if __name__ == "__main__":
    try:
        typer.run(main)
    except NmonnxError as error:
        raise SystemExit(f"error: {error}") from error

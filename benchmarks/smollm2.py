"""SmolLM2-135M, dense beside sparse: perplexity at several patterns, and decode speed.

    python benchmarks/smollm2.py --text wikitext2-test.txt --report smollm2.md

Perplexity is over the first windows of 1024 tokens, without BOS. Decode speed is the median ratio of the times of
paired rounds, which alternate between the two models in one process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import onnxruntime
import typer
from rich.console import Console

from nmonnx.bench import machine
from nmonnx.convert import convert
from nmonnx.demo import speeds
from nmonnx.errors import NmonnxError
from nmonnx.evaluation.perplexity import Perplexity, perplexity
from nmonnx.inference.decoder import Decoder
from nmonnx.inference.text import encode, load_tokenizer, read_text
from nmonnx.models import build
from nmonnx.models.smollm2 import find_smollm2
from nmonnx.pattern import Pattern
from nmonnx.progress import progress_bar
from nmonnx.pruning.recipe import Recipe
from nmonnx.report import Report, show, table, write

WINDOW = 1024


def main(
    text: Annotated[Path, typer.Option(help="The text to measure on.")],
    folder: Annotated[Path, typer.Option(help="Where the models lie or are built.")] = Path("nmonnx-demo"),
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or int4.")] = "fp32",
    patterns: Annotated[str, typer.Option(help="N:M, separated by commas.")] = "2:4,4:8,8:16,16:32,12:16",
    windows: Annotated[int, typer.Option(help="Windows of 1024 tokens; 0: speed only.")] = 8,
    rounds: Annotated[int, typer.Option(help="Paired rounds of decode speed; 0: perplexity only.")] = 11,
    threads: Annotated[str, typer.Option(help="Thread counts for the speed.")] = "1,2",
    report: Annotated[Path | None, typer.Option(help="Also write .md, .json or .html.")] = None,
) -> None:
    words = Console(stderr=True)
    dense = folder / "model.onnx"
    if not dense.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with progress_bar(words, f"writing the {dtype} model") as step:
            build(find_smollm2(), folder, dtype, progress=step)
    tokenizer = load_tokenizer(beside=dense)
    ids = encode(tokenizer, read_text(text))
    models = {"dense": dense} | {p: _sparse(dense, Pattern.parse(p)) for p in patterns.split(",")}
    quality = {n: _perplexity(p, n, ids, windows, words) for n, p in models.items()} if windows else {}
    columns = ["model", "perplexity"] + [f"decode, sparse / dense, {t} threads" for t in threads.split(",") if rounds]
    rows = []
    for name, path in models.items():
        ppl = f"{quality[name].ppl:.2f}" if quality else "-"
        speeds = [_ratio(dense, path, int(t), ids, rounds, words) for t in threads.split(",") if rounds]
        rows.append([name, ppl, *speeds])
    about = (
        f"{machine.cpu()}, onnxruntime {onnxruntime.__version__}, {dtype}, lm_head dense.",
        *([f"Perplexity: {quality['dense'].protocol}, {text.name}."] if quality else []),
    )
    result = Report("SmolLM2-135M-Instruct, magnitude pruning alone", about, (table("Results", columns, rows),))
    show(result, Console())
    if report:
        write(result, report)


def _sparse(dense: Path, pattern: Pattern) -> Path:
    out = dense.with_name(f"model-{str(pattern).replace(':', 'x')}.onnx")
    convert(dense, out, Recipe(pattern), overwrite=True)
    return out


def _perplexity(path: Path, name: str, ids, windows: int, words: Console) -> Perplexity:  # type: ignore[no-untyped-def]
    with progress_bar(words, f"perplexity, {name}") as step:
        return perplexity(Decoder(path), ids, window=WINDOW, max_windows=windows, progress=step)


def _ratio(dense: Path, path: Path, threads: int, ids, rounds: int, words: Console) -> str:  # type: ignore[no-untyped-def]
    if path == dense:
        return "1"
    with progress_bar(words, f"decode, {path.stem}, {threads} threads") as step:
        _, speed = speeds(Decoder(dense, threads), Decoder(path, threads), ids[:64], 24, rounds, step)
    return f"{speed.ratio:.2f} ({speed.sparse:.1f} / {speed.dense:.1f} tokens/s)"


if __name__ == "__main__":
    try:
        typer.run(main)
    except NmonnxError as error:
        raise SystemExit(f"error: {error}") from error

"""The main job on a real language model: SmolLM2-135M built, converted, validated, measured and run."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from rich.console import Console

from nmonnx.convert import Conversion, convert
from nmonnx.errors import UsageError
from nmonnx.evaluation.perplexity import Perplexity, perplexity
from nmonnx.inference.decoder import Decoder
from nmonnx.inference.generate import Generation, generate
from nmonnx.inference.text import encode, load_tokenizer, read_text
from nmonnx.models import build
from nmonnx.models.smollm2 import find_smollm2
from nmonnx.progress import Step, progress_bar
from nmonnx.pruning.recipe import Recipe
from nmonnx.validate import Report as Validation
from nmonnx.validate import validate

BUNDLED_TEXT = "northanger_abbey.txt"
WINDOW = 1024


@dataclass(frozen=True)
class Speed:
    """Tokens per second of the dense and the sparse model, and the median ratio of their times, from rounds that
    alternate between the two; below 1 the sparse model is faster."""

    dense: float
    sparse: float
    ratio: float
    rounds: int


@dataclass(frozen=True)
class Demo:
    """Everything the demo made and measured."""

    dense: Path
    sparse: Path
    conversion: Conversion
    validation: Validation
    dense_perplexity: Perplexity
    sparse_perplexity: Perplexity
    dense_text: Generation
    sparse_text: Generation
    prefill: Speed
    decode: Speed


def run(
    folder: Path,
    recipe: Recipe,
    text: Path | None,
    windows: int,
    prompt: str,
    tokens: int,
    threads: int,
    words: Console,
) -> Demo:
    """Build SmolLM2-135M-Instruct into `folder` (kept if it is there already), convert it, and compare the two.

    Raises InputError when the weights or the text are not there, UsageError when `folder` is a file, and what the
    steps raise.
    """
    story = read_text(text or Path(str(files("nmonnx.models") / BUNDLED_TEXT)))
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is no folder; choose another one for the models")
    dense = folder / "model.onnx"
    if not dense.exists():
        weights = find_smollm2()
        with progress_bar(words, "writing the fp32 model") as step:
            build(weights, folder, progress=step)
    sparse = folder / f"model-{str(recipe.pattern).replace(':', 'x')}.onnx"
    conversion = convert(dense, sparse, recipe, overwrite=True)
    with words.status("validating"):
        validation = validate(dense, sparse, threads=threads)
    tokenizer = load_tokenizer(beside=dense)
    ids = encode(tokenizer, story)
    pair = (Decoder(dense, threads=threads), Decoder(sparse, threads=threads))
    measured = []
    for name, decoder in zip(("dense", "sparse"), pair, strict=True):
        with progress_bar(words, f"perplexity, {name}") as step:
            window = min(WINDOW, decoder.context or WINDOW)
            measured.append(perplexity(decoder, ids, window, max_windows=windows, progress=step))
    before, after = measured
    dense_text, sparse_text = (generate(decoder, tokenizer, prompt, tokens) for decoder in pair)
    with progress_bar(words, "speed, dense beside sparse") as step:
        prefill, decode = speeds(*pair, ids[:256], steps=24, rounds=9, step=step)
    return Demo(dense, sparse, conversion, validation, before, after, dense_text, sparse_text, prefill, decode)


def speeds(
    dense: Decoder, sparse: Decoder, prompt: np.ndarray, steps: int, rounds: int, step: Step | None = None
) -> tuple[Speed, Speed]:
    """Read `prompt` in one call, then write `steps` tokens one call each, with either model in turn, `rounds` times.
    Returns the speed of reading and of writing."""
    seconds = []
    for index in range(rounds):
        seconds.append((_seconds(dense, prompt, steps), _seconds(sparse, prompt, steps)))
        if step:
            step(index + 1, rounds)
    reading, writing = ([(d[part], s[part]) for d, s in seconds] for part in (0, 1))
    return _speed(reading, prompt.size), _speed(writing, steps)


def _seconds(decoder: Decoder, prompt: np.ndarray, steps: int) -> tuple[float, float]:
    start = time.perf_counter()
    logits = decoder.prefill(prompt[None])
    read = time.perf_counter()
    for _ in range(steps):
        logits = decoder.step(logits.argmax(-1))
    return read - start, time.perf_counter() - read


def _speed(seconds: list[tuple[float, float]], tokens: int) -> Speed:
    dense, sparse = (tokens / statistics.median(column) for column in zip(*seconds, strict=True))
    return Speed(dense, sparse, statistics.median(s / d for d, s in seconds), len(seconds))

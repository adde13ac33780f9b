"""`nmonnx generate`: text from a decoder, dense or sparse."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from nmonnx.commands.options import ModelPath, Quiet, Threads


def command(
    model: ModelPath,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue.")],
    tokenizer: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="tokenizer.json, or the folder it lies in. [default: beside MODEL]"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to write.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw among the K most probable tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among the most probable tokens that reach P together.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    threads: Threads = 0,
    quiet: Quiet = False,
) -> None:
    """Continue a prompt with MODEL, any decoder export, with ONNX Runtime alone. The text goes to stdout."""
    from nmonnx.inference.decoder import Decoder
    from nmonnx.inference.generate import Sampling, generate
    from nmonnx.inference.text import load_tokenizer

    sampling = Sampling(temperature, top_k, top_p, seed)
    words = load_tokenizer(tokenizer, beside=model)
    decoder = Decoder(model, threads=threads)

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    done = generate(decoder, words, prompt, max_new_tokens, sampling, on_text=write)
    sys.stdout.write("\n")
    if not quiet:
        end = "ended by the model" if done.ended else "stopped at the limit"
        Console(stderr=True).print(
            f"{len(done.prompt_tokens)} prompt tokens at {done.prefill_rate:.1f}/s,"
            f" {len(done.tokens)} new tokens at {done.decode_rate:.1f}/s, {end}",
            highlight=False,
        )

"""`nmonnx gradients`: how the loss depends on what the layers read, for --allocate fisher and --criterion grad."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from nmonnx.commands.options import (
    ModelPath,
    Overwrite,
    Quiet,
    TokenizerPath,
    beside,
    refuse_output,
    tell,
)
from nmonnx.report import Report, counted


def command(
    model: ModelPath,
    text: Annotated[Path, typer.Option(help="The text to run on, UTF-8. Not one that you will measure on.")],
    tokenizer: TokenizerPath = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="The file to write. [default: MODEL-gradients.npz beside the model]"),
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window, each read from an empty cache.")] = 256,
    windows: Annotated[int, typer.Option(min=1, help="Windows, spread over the text.")] = 16,
    sample: Annotated[int, typer.Option(min=1, help="Tokens to keep, about.")] = 256,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Run MODEL forward and back over a text (needs PyTorch) and write the gradient of the loss by what each linear
    layer reads."""
    from nmonnx.inference.text import encode, load_tokenizer, read_text
    from nmonnx.learn.gradients import measure_gradients
    from nmonnx.progress import progress_bar

    output = output or beside(model, "-gradients.npz")
    refuse_output(output, ".npz", overwrite)
    tokens = encode(load_tokenizer(tokenizer, beside=model), read_text(text))
    words = Console(stderr=True)
    with progress_bar(words, "forward and back", disable=quiet or not words.is_terminal) as step:
        made = measure_gradients(model, tokens, window, windows, sample, step)
    made.save(output)
    said = f"{counted(len(made.sites), 'layer')}. {made.protocol}."
    data = {"command": "gradients", "output": str(output), "layers": len(made.sites), "protocol": made.protocol}
    tell(Report(f"wrote {output}", (said,), (), data, (model,)), None, quiet)

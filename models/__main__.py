"""python -m nmonnx.models SOURCE -o DIR"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from nmonnx.errors import NmonnxError
from nmonnx.models import DTYPES, build
from nmonnx.models.smollm2 import find_smollm2

NAMED = {"smollm2": find_smollm2}


def export(
    source: Annotated[
        str, typer.Argument(help="A .gguf file, a Hugging Face folder with safetensors weights, or 'smollm2'.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write the model to.")],
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "fp32",
    fuse_qkv: Annotated[bool, typer.Option("--fuse-qkv", help="Pack q, k and v into one linear layer.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is there.")] = False,
) -> None:
    """Build an ONNX decoder of the Llama family, as the onnxruntime-genai builder writes it, without torch."""
    words = Console(stderr=True)
    try:
        path = NAMED[source]() if source in NAMED else Path(source)
        with Progress(console=words, transient=True, disable=not words.is_terminal) as bar:
            task = bar.add_task(f"writing {dtype} weights", total=None)
            built = build(
                path, output, dtype, fuse_qkv, overwrite, lambda n, of: bar.update(task, completed=n, total=of)
            )
    except NmonnxError as e:
        words.print(f"error: {e}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(e.exit_code) from e
    print(built)


if __name__ == "__main__":
    typer.run(export)

"""Recipes that build ONNX models, without torch, from GGUF files and Hugging Face folders."""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from nmonnx.errors import ModelError, UsageError
from nmonnx.models.genai_config import genai_config
from nmonnx.models.llama import write_llama
from nmonnx.models.source import Source, open_source
from nmonnx.models.writer import Progress, write_model

__all__ = ["DTYPES", "build"]
DTYPES = ("fp32", "fp16", "int4")
_MODEL = "model.onnx"


def build(
    source: Path,
    out_dir: Path,
    dtype: str = "fp32",
    fuse_qkv: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Build a Llama-family decoder as the onnxruntime-genai builder spells it; returns the path of model.onnx.

    source    a .gguf file, or a folder with config.json and safetensors weights
    out_dir   gets model.onnx, model.onnx.data, genai_config.json and the tokenizer's files, all at the end
    dtype     "fp32"; "fp16" (weights, activations, caches and logits); "int4" (MatMulNBits from Q4_0 or Q4_1
              blocks of a GGUF file, nothing is rounded; embedding, norms and activations are fp32)
    fuse_qkv  one packed q/k/v linear a layer instead of three
    progress  called with (bytes written, bytes in all)

    Raises InputError when the source is not a model that this recipe covers, UsageError for a wrong option or
    a file that is there already, ModelError when the files cannot be written.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    reader = open_source(Path(source))
    graph = write_llama(reader, dtype, fuse_qkv)
    out_dir = Path(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".build-", dir=out_dir) as folder:
            part = Path(folder)
            _write_companions(reader, part)
            names = [f"{_MODEL}.data", *sorted(os.listdir(part)), _MODEL]
            _refuse_present(out_dir, [] if overwrite else names)
            write_model(graph.model(), graph.weights.values(), part / _MODEL, progress)
            for name in names:
                os.replace(part / name, out_dir / name)
    except OSError as e:
        raise ModelError(f"{out_dir / _MODEL} cannot be written: {e}") from e
    return out_dir / _MODEL


def _write_companions(reader: Source, folder: Path) -> None:
    reader.write_tokenizer(folder)
    vocabulary = reader.shape("model.embed_tokens.weight")[0]
    config = json.dumps(genai_config(reader.config, vocabulary, _MODEL), indent=4)
    (folder / "genai_config.json").write_text(config + "\n", encoding="utf-8")


def _refuse_present(out_dir: Path, names: list[str]) -> None:
    present = [name for name in names if (out_dir / name).exists()]
    if present:
        raise UsageError(f"{out_dir / present[0]} is there already; choose another folder or pass --overwrite")

"""Recipes that build ONNX models, without torch, from GGUF files and Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path

from nmonnx.errors import UsageError
from nmonnx.models.genai_config import genai_config
from nmonnx.models.llama import write_llama
from nmonnx.models.source import open_source
from nmonnx.models.writer import Progress, write_model

DTYPES = ("fp32", "fp16", "int4")
__all__ = ["DTYPES", "build"]


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
    out_dir   gets model.onnx, model.onnx.data, genai_config.json and the tokenizer's files
    dtype     "fp32"; "fp16" (weights, activations, caches and logits); "int4" (MatMulNBits from Q4_0 or Q4_1
              blocks of a GGUF file, nothing is rounded; embedding, head, norms and activations are fp32)
    fuse_qkv  one packed q/k/v linear a layer instead of three
    progress  called with (bytes written, bytes in all)

    Raises InputError when the source is not a model that this recipe covers, UsageError for a wrong option.
    """
    path = out_dir / "model.onnx"
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; choose another folder or overwrite it with --overwrite")
    reader = open_source(source)
    graph = write_llama(reader, dtype, fuse_qkv)
    vocabulary = reader.shape("model.embed_tokens.weight")[0]
    out_dir.mkdir(parents=True, exist_ok=True)
    reader.write_tokenizer(out_dir)
    config = json.dumps(genai_config(reader.config, vocabulary, path.name), indent=4)
    (out_dir / "genai_config.json").write_text(config + "\n", encoding="utf-8")
    write_model(graph.model(), graph.weights.values(), path, progress)
    return path

"""`Source`: where a recipe reads a model from, and `open_source`, which picks the reader."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

import numpy as np

from nmonnx.errors import InputError
from nmonnx.models.config import LlamaConfig
from nmonnx.models.q4 import Q4Blocks


class Source(Protocol):
    """A model's configuration, weights and tokenizer. Tensors have Hugging Face's names and row order
    (rotary halves, not pairs), and are read from disk each time they are asked for."""

    path: Path
    config: LlamaConfig

    def names(self) -> Collection[str]:
        """Every tensor there is."""

    def shape(self, name: str) -> tuple[int, ...]:
        """[out, in] of a linear layer, [vocabulary, hidden] of the embedding."""

    def kind(self, name: str) -> str:
        """How the values are stored: F32, F16, BF16, Q4_1, ..."""

    def array(self, name: str) -> np.ndarray:
        """The values as float32 or float16, dequantised."""

    def q4(self, name: str) -> Q4Blocks:
        """The 4-bit blocks of a tensor whose kind is in `q4.LOSSLESS`."""

    def write_tokenizer(self, folder: Path) -> None:
        """Write tokenizer.json and what belongs to it."""


def open_source(path: Path) -> Source:
    """Open a GGUF file or a Hugging Face folder (config.json and safetensors). Raises InputError."""
    from nmonnx.models.weights_gguf import GgufSource
    from nmonnx.models.weights_safetensors import SafetensorsSource

    if path.is_dir():
        return SafetensorsSource(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; give a .gguf file or a Hugging Face folder with config.json")
    if path.suffix.lower() != ".gguf":
        raise InputError(f"{path} is neither a .gguf file nor a Hugging Face folder with config.json")
    return GgufSource(path)

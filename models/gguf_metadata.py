"""`GgufMetadata`: the key-value part of a GGUF file, and the configuration it holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nmonnx.errors import InputError
from nmonnx.models.config import LlamaConfig, inverse_frequencies

ARCHITECTURES = ("llama", "qwen2", "qwen3")


class GgufMetadata:
    """Values by key; `fields` are those of gguf.GGUFReader."""

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        """Raises InputError when the file holds another architecture or is a part of a split model."""
        self.path = path
        self._fields = fields
        self.architecture = self.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise InputError(
                f"{path}: architecture is {self.architecture!r}; this recipe builds {', '.join(ARCHITECTURES)}"
            )
        if self.get("split.count", 1) > 1:
            raise InputError(f"{path} is one part of several; merge them with llama-gguf-split --merge")

    def get(self, key: str, default: Any = None) -> Any:
        """A number, a text, or a list of them."""
        if key not in self._fields:
            return default
        from gguf import GGUFValueType

        field = self._fields[key]
        parts = [field.parts[i] for i in field.data]
        text = field.types[-1] == GGUFValueType.STRING
        values = [bytes(p).decode("utf-8") if text else p[0].item() for p in parts]
        return values if field.types[0] == GGUFValueType.ARRAY else values[0]

    def config(self, tied: bool, rope_divisors: np.ndarray | None) -> LlamaConfig:
        """rope_divisors [head_size / 2]: the tensor rope_freqs, by which llama.cpp stretches long waves.
        Raises InputError naming what is missing or not covered."""
        heads, hidden = self._count("attention.head_count"), self._count("embedding_length")
        head_size = self._count("attention.key_length", hidden // heads)
        if self._count("rope.dimension_count", head_size) != head_size:
            raise InputError(f"{self.path}: only a part of each head is rotated; this recipe rotates whole heads")
        context = self._count("context_length")
        eos, eot = self.get("tokenizer.ggml.eos_token_id"), self.get("tokenizer.ggml.eot_token_id")
        return LlamaConfig(
            family=self.architecture,
            layers=self._count("block_count"),
            hidden=hidden,
            intermediate=self._count("feed_forward_length"),
            heads=heads,
            kv_heads=self._count("attention.head_count_kv", heads),
            head_size=head_size,
            context=min(context, self._count("attention.sliding_window", context)),
            rms_eps=self._option("attention.layer_norm_rms_epsilon", 1e-6),
            inv_freq=self._frequencies(head_size, rope_divisors),
            tied=tied,
            bos=self.get("tokenizer.ggml.bos_token_id"),
            eos=tuple(dict.fromkeys(i for i in (eos, eot) if i is not None)),
            pad=self.get("tokenizer.ggml.padding_token_id"),
        ).checked(str(self.path))

    def _frequencies(self, head_size: int, divisors: np.ndarray | None) -> tuple[float, ...]:
        kind = self._option("rope.scaling.type", "none")
        scaling = {"type": "default" if kind == "none" else kind, "factor": self._option("rope.scaling.factor", 1.0)}
        theta = self._option("rope.freq_base", 10000.0)
        plain = inverse_frequencies(theta, head_size, scaling, str(self.path))
        return plain if divisors is None else tuple((np.array(plain, np.float32) / divisors).tolist())

    def _option(self, key: str, default: Any) -> Any:
        return self.get(f"{self.architecture}.{key}", default)

    def _count(self, key: str, default: int | None = None) -> int:
        value = self._option(key, default)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{self.path}: metadata {key!r} is {value!r}, one positive whole number was expected")
        return value

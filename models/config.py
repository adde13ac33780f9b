"""`LlamaConfig`: the numbers that shape a decoder of the Llama family, and its rotary frequencies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nmonnx.errors import InputError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class LlamaConfig:
    """family    model type as Hugging Face and onnxruntime-genai name it
    context   longest sequence in tokens: the rows of the rotary caches
    inv_freq  float32 [head_size / 2], radians per position of each rotary pair
    tied      the head reads the embedding's weight
    eos       ids that end a text, the first one is the tokenizer's
    search    defaults for sampling, as generation_config.json gives them
    """

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    context: int
    rms_eps: float
    inv_freq: tuple[float, ...]
    tied: bool
    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    search: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], generation: Mapping[str, Any], where: str) -> LlamaConfig:
        """Read config.json and generation_config.json (may be empty). Raises InputError naming what is
        missing or what this recipe does not cover."""
        family = config.get("model_type")
        if family not in FAMILIES:
            raise InputError(
                f"{where}: model_type is {family!r}; this recipe builds {', '.join(FAMILIES)}."
                " Export other models with optimum-onnx or the onnxruntime-genai builder"
            )
        if config.get("hidden_act", "silu") != "silu":
            raise InputError(f"{where}: hidden_act is {config['hidden_act']!r}; this recipe covers silu only")
        if config.get("quantization_config"):
            raise InputError(f"{where}: the weights are quantised already; give the unquantised folder or a GGUF file")
        heads, hidden = _int(config, "num_attention_heads", where), _int(config, "hidden_size", where)
        head_size = int(config.get("head_dim") or hidden // heads)
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
        if float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
            raise InputError(f"{where}: partial_rotary_factor is not 1; this recipe rotates whole heads only")
        ends = generation.get("eos_token_id", config.get("eos_token_id"))
        return cls(
            family=family,
            layers=_int(config, "num_hidden_layers", where),
            hidden=hidden,
            intermediate=_int(config, "intermediate_size", where),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_size=head_size,
            context=_context(config, where),
            rms_eps=float(config.get("rms_norm_eps", 1e-6)),
            inv_freq=inverse_frequencies(theta, head_size, rope, where),
            tied=bool(config.get("tie_word_embeddings", False)),
            bos=generation.get("bos_token_id", config.get("bos_token_id")),
            eos=tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,),
            pad=generation.get("pad_token_id", config.get("pad_token_id")),
            search=tuple((k, v) for k, v in generation.items() if not k.endswith("_token_id")),
        ).checked(where)

    def checked(self, where: str) -> LlamaConfig:
        """Itself, or InputError when ONNX Runtime's GroupQueryAttention could not run it."""
        if self.heads % self.kv_heads:
            raise InputError(f"{where}: {self.heads} attention heads do not divide over {self.kv_heads} KV heads")
        if self.head_size % 8:
            raise InputError(f"{where}: the head size is {self.head_size}; GroupQueryAttention needs a multiple of 8")
        return self


def inverse_frequencies(theta: float, head_size: int, scaling: Mapping[str, Any], where: str) -> tuple[float, ...]:
    """Rotary frequencies of plain, linear and llama3 scaling. Raises InputError for any other kind."""
    exponents = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
    plain = (1.0 / np.float32(theta) ** exponents).astype(np.float32)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    try:
        if kind == "linear":
            plain = plain / np.float32(scaling["factor"])
        elif kind == "llama3":
            plain = _llama3(plain, scaling)
        elif kind != "default":
            raise InputError(f"{where}: rope scaling {kind!r} is not one of default, linear and llama3")
    except KeyError as e:
        raise InputError(f"{where}: rope scaling {kind!r} lacks {e}") from e
    return tuple(float(f) for f in plain)


def _llama3(plain: np.ndarray, scaling: Mapping[str, Any]) -> np.ndarray:
    """Long waves are stretched by `factor`, short ones kept, those between blended."""
    factor, low, high = (scaling[k] for k in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = scaling["original_max_position_embeddings"] * plain / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (plain * (kept + (1 - kept) / factor)).astype(np.float32)


def _context(config: Mapping[str, Any], where: str) -> int:
    # Inside one window, sliding attention and full attention are the same.
    context = _int(config, "max_position_embeddings", where)
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return min(context, int(window)) if window else context


def _int(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise InputError(f"{where}: {key} is {value!r}, a positive whole number was expected")
    return value

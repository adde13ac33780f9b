"""`GgufSource`: a GGUF file, memory-mapped, its tensors under Hugging Face's names and row order."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from nmonnx.errors import InputError
from nmonnx.models import q4
from nmonnx.models.config import LlamaConfig, inverse_frequencies
from nmonnx.models.tokenizer_gguf import write_tokenizer

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GgufSource:
    """A llama, qwen2 or qwen3 model in one GGUF file."""

    def __init__(self, path: Path) -> None:
        """Raises InputError when the file cannot be read or holds another kind of model."""
        self.path = path
        reader = _read(path)
        self.fields = {key: field for key, field in reader.fields.items()}
        self._tensors = {_name(t.name): t for t in reader.tensors}
        rope = self._tensors.pop("rope_freqs.weight", None)
        self.config = self._config(None if rope is None else np.asarray(rope.data, np.float32))

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(d) for d in reversed(self._tensors[name].shape))

    def kind(self, name: str) -> str:
        return str(self._tensors[name].tensor_type.name)

    def array(self, name: str) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as e:
            raise InputError(f"{self.path}: tensor {name!r} is {self.kind(name)}, which gguf cannot read") from e
        return self._rotary_halves(name, values)

    def q4(self, name: str) -> q4.Q4Blocks:
        return q4.from_gguf(self._rotary_halves(name, self._tensors[name].data), self.kind(name))

    def write_tokenizer(self, folder: Path) -> list[str]:
        return write_tokenizer(self, folder)

    def field(self, key: str, default: Any = None) -> Any:
        """A metadata value: a number, a text or a list of them."""
        if key not in self.fields:
            return default
        from gguf import GGUFValueType

        field = self.fields[key]
        parts = [field.parts[i] for i in field.data]
        text = field.types[-1] == GGUFValueType.STRING
        values = [bytes(p).decode("utf-8") if text else p[0].item() for p in parts]
        return values if field.types[0] == GGUFValueType.ARRAY else values[0]

    def _rotary_halves(self, name: str, rows: np.ndarray) -> np.ndarray:
        """llama.cpp keeps the q and k rows of its "llama" models in rotary pairs: (0, h/2), (1, h/2 + 1), ...;
        Hugging Face and ONNX Runtime rotate halves."""
        module = name.rsplit(".", 2)[-2]
        if self.field("general.architecture") != "llama" or module not in ("q_proj", "k_proj"):
            return rows
        heads = self.config.heads if module == "q_proj" else self.config.kv_heads
        paired = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
        return paired.swapaxes(1, 2).reshape(rows.shape)

    def _config(self, rope_divisors: np.ndarray | None) -> LlamaConfig:
        arch = self.field("general.architecture")
        self._refuse_foreign(arch)
        heads, hidden = self._count("attention.head_count"), self._count("embedding_length")
        head_size = self._option("attention.key_length", hidden // heads)
        scaling = {
            "type": {"none": "default"}.get(kind := self._option("rope.scaling.type", "none"), kind),
            "factor": self._option("rope.scaling.factor", 1.0),
        }
        theta = self._option("rope.freq_base", 10000.0)
        inv_freq = np.array(inverse_frequencies(theta, head_size, scaling, str(self.path)), np.float32)
        if rope_divisors is not None:
            inv_freq = inv_freq / rope_divisors
        eos, eot = self.field("tokenizer.ggml.eos_token_id"), self.field("tokenizer.ggml.eot_token_id")
        context, window = self._count("context_length"), self._option("attention.sliding_window", 0)
        return LlamaConfig(
            family=arch,
            layers=self._count("block_count"),
            hidden=hidden,
            intermediate=self._count("feed_forward_length"),
            heads=heads,
            kv_heads=self._option("attention.head_count_kv", heads),
            head_size=head_size,
            context=min(context, window) if window else context,
            rms_eps=self._option("attention.layer_norm_rms_epsilon", 1e-6),
            inv_freq=tuple(float(f) for f in inv_freq),
            tied="lm_head.weight" not in self._tensors,
            bos=self.field("tokenizer.ggml.bos_token_id"),
            eos=tuple(dict.fromkeys(i for i in (eos, eot) if i is not None)),
            pad=self.field("tokenizer.ggml.padding_token_id"),
        ).checked(str(self.path))

    def _refuse_foreign(self, arch: str) -> None:
        if arch not in ARCHITECTURES:
            raise InputError(f"{self.path}: architecture is {arch!r}; this recipe builds {', '.join(ARCHITECTURES)}")
        if self.field("split.count", 1) > 1:
            raise InputError(f"{self.path} is one part of several; merge them with llama-gguf-split --merge")
        size = self._option(
            "attention.key_length", self._count("embedding_length") // self._count("attention.head_count")
        )
        if self._option("rope.dimension_count", size) != size:
            raise InputError(f"{self.path}: only part of each head is rotated; this recipe rotates whole heads only")

    def _option(self, key: str, default: Any) -> Any:
        return self.field(f"{self.field('general.architecture')}.{key}", default)

    def _count(self, key: str) -> int:
        value = self._option(key, None)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{self.path}: metadata {key!r} is {value!r}, one positive whole number was expected")
        return value


def _read(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as e:
        raise InputError(f"reading {path} needs the package gguf: pip install gguf") from e
    try:
        return GGUFReader(str(path))
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as e:
        raise InputError(f"{path} is not a GGUF file, or an incomplete download: {e}") from e


def _name(gguf_name: str) -> str:
    stem, _, leaf = gguf_name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{leaf}"
    block, index, part = [*stem.split(".", 2), "", ""][:3]
    if block == "blk" and part in _IN_BLOCK:
        return f"model.layers.{index}.{_IN_BLOCK[part]}.{leaf}"
    return gguf_name

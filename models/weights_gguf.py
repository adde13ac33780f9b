"""`GgufSource`: a GGUF file, memory-mapped, its tensors under Hugging Face's names and row order."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from nmonnx.errors import InputError
from nmonnx.models import q4
from nmonnx.models.gguf_metadata import GgufMetadata
from nmonnx.models.tokenizer_gguf import write_tokenizer

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
        self.metadata = GgufMetadata(path, reader.fields)
        self._tensors = {_name(t.name): t for t in reader.tensors}
        divisors = self._tensors.pop("rope_freqs.weight", None)
        tied = "lm_head.weight" not in self._tensors
        self.config = self.metadata.config(tied, None if divisors is None else divisors.data)

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
        return self._in_halves(name, values)

    def q4(self, name: str) -> q4.Q4Blocks:
        return q4.from_gguf(self._in_halves(name, self._tensors[name].data), self.kind(name))

    def write_tokenizer(self, folder: Path) -> None:
        write_tokenizer(self.metadata, folder)

    def _in_halves(self, name: str, rows: np.ndarray) -> np.ndarray:
        """llama.cpp keeps the q and k rows of "llama" models as the pairs that rotate together:
        0, h/2, 1, h/2 + 1, ...; Hugging Face and ONNX Runtime keep the first halves, then the second."""
        heads = {"q_proj": self.config.heads, "k_proj": self.config.kv_heads}.get(name.split(".")[-2])
        if heads is None or self.metadata.architecture != "llama":
            return rows
        pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
        return pairs.swapaxes(1, 2).reshape(rows.shape)


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

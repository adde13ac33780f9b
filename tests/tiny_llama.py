"""Tiny random decoders as Hugging Face folders, written with numpy alone, and a runner for what is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""The sizes of the zoo's models."""


def weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face's names; Qwen2 gets q/k/v biases, Qwen3 q/k norms."""
    rng = np.random.default_rng(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    size = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = size * config["num_attention_heads"], size * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{p}_proj.weight": (n, hidden) for p, n in (("q", q), ("k", kv), ("v", kv))}
        shapes |= {f"{layer}.self_attn.o_proj.weight": (hidden, q)}
        shapes |= {f"{layer}.mlp.{p}_proj.weight": (inner, hidden) for p in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{layer}.{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
        if config["model_type"] == "qwen2":
            shapes |= {f"{layer}.self_attn.{p}_proj.bias": (n,) for p, n in (("q", q), ("k", kv), ("v", kv))}
        if config["model_type"] == "qwen3":
            shapes |= {f"{layer}.self_attn.{p}_norm.weight": (size,) for p in "qk"}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return {
        name: (rng.standard_normal(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.2)).astype(np.float32)
        + (len(shape) == 1 and name.endswith("norm.weight"))
        for name, shape in shapes.items()
    }


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """uint16 values are taken for the bits of bfloat16."""
    kinds = {"float32": "F32", "float16": "F16", "uint16": "BF16", "float64": "F64", "int64": "I64"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, values in tensors.items():
        span = [offset, offset + values.nbytes]
        header[name] = {"dtype": kinds[str(values.dtype)], "shape": list(values.shape), "data_offsets": span}
        offset += values.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(v.tobytes() for v in tensors.values()))


class Runner:
    """One ONNX decoder: feeds what it asks for, carries the cache."""

    def __init__(self, path: Path) -> None:
        self.session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.past: dict[str, np.ndarray] = {}

    def __call__(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Logits [batch, sequence, vocabulary] of `ids`, after everything that was run since `restart`."""
        if not self.past:
            self.past = {i.name: self._empty(i, len(ids)) for i in self.session.get_inputs() if "past" in i.name}
        before = next(iter(self.past.values())).shape[2]
        if mask is None:
            mask = np.ones((len(ids), before + ids.shape[1]), np.int64)
        feeds = {"input_ids": ids, "attention_mask": mask, **self.past}
        if any(i.name == "position_ids" for i in self.session.get_inputs()):
            first = mask.sum(1, keepdims=True) - ids.shape[1] if before else np.zeros((len(ids), 1), np.int64)
            feeds["position_ids"] = first + np.arange(ids.shape[1])
        logits, *present = self.session.run(None, feeds)
        names = [o.name.replace("present", "past_key_values") for o in self.session.get_outputs()[1:]]
        self.past = dict(zip(names, present, strict=True))
        return logits

    def restart(self) -> Runner:
        self.past = {}
        return self

    def _empty(self, value: Any, batch: int) -> np.ndarray:
        kind = np.float16 if value.type == "tensor(float16)" else np.float32
        return np.zeros((batch, value.shape[1], 0, value.shape[3]), kind)

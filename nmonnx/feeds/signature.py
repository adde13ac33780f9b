"""What each input of an LLM graph is for, whichever exporter named it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from onnx import GraphProto, helper

from nmonnx.errors import InputError
from nmonnx.onnx_file.model_config import ModelConfig, read_config

if TYPE_CHECKING:
    import onnxruntime as ort

Dim = int | str | None
"""A size, the name of a symbolic size, or unknown."""

DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint64)": np.uint64,
    "tensor(uint32)": np.uint32,
    "tensor(uint16)": np.uint16,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
_PAGED = re.compile(r"block_?table|slot_mapping|cumulative_seq|cu_seq")
_CARRIED = ("past", "state")
_NOISE = {"past", "present", "values", "cache", "in", "out", "input", "output", "new", "updated", "next", "prev"}


@dataclass(frozen=True)
class Port:
    """One input or output of a graph.

    role  of an input: tokens, embeds, mask, causal_mask, positions, past (a KV cache that grows along `axis`),
          state (of fixed size, carried from call to call), use_cache, keep_logits, seqlens, total, past_length, other;
          of an output: logits, present, other
    """

    name: str
    dtype: np.dtype
    shape: tuple[Dim, ...]
    role: str = "other"
    axis: int = 0


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a graph with their roles; `cache` pairs every past/state input with the output
    that is its next value."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    cache: tuple[tuple[str, str], ...] = ()
    config: ModelConfig = field(default_factory=ModelConfig)
    path: Path | None = None

    def of(self, role: str) -> list[Port]:
        return [p for p in self.inputs if p.role == role]

    def first(self, role: str) -> Port | None:
        return next((p for p in (*self.inputs, *self.outputs) if p.role == role), None)

    @property
    def has_cache(self) -> bool:
        """Whether tokens of earlier calls reach the graph through inputs."""
        return bool(self.cache) or any(p.role in _CARRIED for p in self.inputs)

    def without_cache(self) -> Signature:
        """The same calls, without the inputs that carry the cache."""
        return replace(self, inputs=tuple(p for p in self.inputs if p.role not in _CARRIED))

    @property
    def batch(self) -> int | None:
        """The only batch size the graph takes, or None when it is free."""
        return self._static(0)

    @property
    def length(self) -> int | None:
        """The only number of tokens a call may hold, or None when it is free."""
        return self._static(1)

    def _static(self, axis: int) -> int | None:
        port = self.first("tokens") or self.first("embeds")
        size = port.shape[axis] if port and len(port.shape) > axis else None
        return size if isinstance(size, int) else None


def signature(session: ort.InferenceSession, model_path: str | Path | None = None) -> Signature:
    """Classify the inputs and outputs of a session; the JSON files beside `model_path` fill in sizes that the graph
    leaves symbolic. Raises InputError for a graph with a paged cache and for element types numpy lacks."""
    path = Path(model_path) if model_path is not None else None
    inputs = tuple(_classify(_port(node, "input")) for node in session.get_inputs())
    outputs = tuple(_port(node, "output") for node in session.get_outputs())
    paged = [p.name for p in inputs if _PAGED.search(p.name.lower())]
    if paged:
        raise InputError(
            f"inputs {paged} belong to a paged KV cache, which only a serving engine fills; export the model with"
            " past_key_values inputs, or give the inputs yourself in an .npz file"
        )
    inputs = _with_tokens(inputs)
    outputs = _with_logits(outputs)
    cache = _pair(inputs, outputs)
    presents = {present for _, present in cache}
    outputs = tuple(replace(p, role="present") if p.name in presents else p for p in outputs)
    return Signature(inputs, outputs, cache, read_config(path), path)


def input_ports(graph: GraphProto) -> tuple[Port, ...]:
    """The inputs of a graph that no session has opened, with their roles."""
    stored = {t.name for t in graph.initializer}
    ports = []
    for value in graph.input:
        tensor = value.type.tensor_type
        if value.name in stored or not tensor.elem_type:
            continue
        dims = (d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim)
        ports.append(_classify(Port(value.name, helper.tensor_dtype_to_np_dtype(tensor.elem_type), tuple(dims))))
    return _with_tokens(tuple(ports))


def _port(node: ort.NodeArg, kind: str) -> Port:
    if node.type not in DTYPES:
        raise InputError(f"{kind} {node.name!r} has type {node.type}, which numpy has no arrays for")
    return Port(node.name, np.dtype(DTYPES[node.type]), tuple(node.shape))


def _classify(port: Port) -> Port:
    name, rank = port.name.lower(), len(port.shape)
    integer, floating = port.dtype.kind in "iu", port.dtype.kind == "f"
    role = "other"
    if "cross" in name or name.startswith("encoder"):
        role = "other"
    elif "use_cache" in name:
        role = "use_cache"
    elif "logits_to_keep" in name:
        role = "keep_logits"
    elif "seqlens_k" in name:
        role = "seqlens"
    elif integer and rank <= 1 and re.search(r"past.*len", name):
        role = "past_length"
    elif integer and rank <= 1 and re.search(r"total.*len", name):
        role = "total"
    elif rank == 4 and "mask" in name:
        role = "causal_mask"
    elif rank == 2 and "mask" in name:
        role = "mask"
    elif integer and re.search(r"pos(ition)?_?ids|cache_position|^positions?$", name) and "pixel" not in name:
        role = "positions"
    elif integer and rank == 2 and (name.endswith("input_ids") or name in ("ids", "tokens", "token_ids")):
        role = "tokens"
    elif floating and rank == 3 and "embeds" in name:
        role = "embeds"
    elif re.search(r"past|cache|state", name) and rank >= 3:
        axis = _growing_axis(port)
        role = "other" if _is_encoder(name) else "state" if axis is None else "past"
        return replace(port, role=role, axis=axis or 0)
    return replace(port, role=role)


def _is_encoder(name: str) -> bool:
    return "hidden_states" in name


def _growing_axis(port: Port) -> int | None:
    """The axis of past positions: named so, or the one before the head size in [B, H, past, D], [2, B, H, past, D]."""
    named = [
        i for i, d in enumerate(port.shape) if isinstance(d, str) and "batch" not in d and re.search("past|seq", d)
    ]
    if len(named) == 1:
        return named[0]
    axis = len(port.shape) - 2
    return axis if len(port.shape) >= 4 and not isinstance(port.shape[axis], int) else None


def _with_tokens(inputs: tuple[Port, ...]) -> tuple[Port, ...]:
    """A graph traced without names: its only integer matrix without a role is the tokens."""
    if any(p.role in ("tokens", "embeds") for p in inputs):
        return inputs
    rest = [p for p in inputs if p.role == "other" and p.dtype.kind in "iu" and len(p.shape) == 2]
    if len(rest) != 1 or not all(isinstance(d, str) or d is None for d in rest[0].shape):
        return inputs
    return tuple(replace(p, role="tokens") if p is rest[0] else p for p in inputs)


def _with_logits(outputs: tuple[Port, ...]) -> tuple[Port, ...]:
    named = [p for p in outputs if "logits" in p.name.lower()]
    first = next(iter(named or [p for p in outputs if len(p.shape) == 3 and p.dtype.kind == "f"]), None)
    return tuple(replace(p, role="logits") if p is first else p for p in outputs)


def _pair(inputs: tuple[Port, ...], outputs: tuple[Port, ...]) -> tuple[tuple[str, str], ...]:
    """Past -> present by what is left of their names (`key`, `0`), else by order when the counts agree."""
    past = [p for p in inputs if p.role in _CARRIED]
    present = [p for p in outputs if p.role != "logits" and len(p.shape) >= 3]
    by_key = {_key(p.name): p.name for p in present}
    if len(by_key) == len(present) and all(_key(p.name) in by_key for p in past):
        return tuple((p.name, by_key[_key(p.name)]) for p in past)
    if len(past) == len(present):
        return tuple((a.name, b.name) for a, b in zip(past, present, strict=True))
    return ()


def _key(name: str) -> tuple[str, ...]:
    words = re.findall(r"[a-z]+|\d+", re.sub(r"key_values?", "", name.lower()))
    kept = [{"k": "key", "v": "value"}.get(w, w) for w in words if w not in _NOISE]
    return tuple(sorted(kept))

"""Input arrays for any LLM graph: from tokens, from files, or a random set that exercises prompt and decode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from nmonnx.errors import InputError
from nmonnx.feeds.signature import Port, Signature


@dataclass(frozen=True)
class Past:
    """A filled cache: arrays by input name, of which the first `length` positions hold tokens."""

    length: int = 0
    values: Mapping[str, np.ndarray] = field(default_factory=dict)


def make_feeds(
    sig: Signature,
    tokens: np.ndarray,
    past: Past | int = 0,
    lengths: np.ndarray | None = None,
    pad: str = "right",
    capacity: int | None = None,
    rng: np.random.Generator | None = None,
    keep: int = 0,
    size: int = 2,
) -> dict[str, np.ndarray]:
    """Every input of the graph for `tokens` [B, T] that follow `past` positions.

    past      a filled cache, or a number of positions (0: empty) whose values are zeros, random with `rng`
    lengths   real tokens of each row [B]; the rest is padding on the `pad` side, masked out
    capacity  positions that the cache arrays hold when the graph writes into a buffer instead of growing it
    keep      positions whose logits are wanted, for graphs that ask (0: all)
    size      of symbolic dimensions that neither tokens nor cache fix

    Inputs unrelated to tokens (images, encoder states) are drawn from `rng`, seeded 0 when not given.
    Raises InputError when the graph's fixed sizes do not allow the shape of `tokens`.
    """
    call = _Call(sig, np.asarray(tokens), past, lengths, pad, capacity, rng, keep, size)
    return {port.name: call.value(port) for port in sig.inputs}


class _Call:
    """One call's sizes, and the value of each input."""

    def __init__(
        self,
        sig: Signature,
        tokens: np.ndarray,
        past: Past | int,
        lengths: np.ndarray | None,
        pad: str,
        capacity: int | None,
        rng: np.random.Generator | None,
        keep: int,
        size: int,
    ) -> None:
        if tokens.ndim != 2:
            raise InputError(f"tokens must be a [batch, length] matrix, not of shape {list(tokens.shape)}")
        self.sig, self.tokens, self.keep, self.size = sig, tokens, keep, size
        self.batch, self.length = tokens.shape
        self.past = Past(past) if isinstance(past, int) else past
        self.random_past = rng is not None
        self.rng = rng if rng is not None else np.random.default_rng(0)
        self.capacity = max(capacity or sig.config.window or 0, self.past.length)
        if sig.config.window:
            self.capacity = max(self.capacity, self.past.length + self.length)
        self.total = self.past.length + self.length
        self.valid = _valid(self.batch, self.length, lengths, pad)
        self.sizes = self._named_sizes()

    def value(self, port: Port) -> np.ndarray:
        """The array of one input, in its type. Raises InputError when it cannot have the graph's shape."""
        array = getattr(self, f"_{port.role}")(port)
        check_array(port, array, "these tokens")
        return array

    def _named_sizes(self) -> dict[str, int]:
        """Symbolic sizes as the inputs with a known role fix them; the same name has the same size everywhere."""
        sizes: dict[str, int] = {}
        for port in self.sig.inputs:
            known = {
                "tokens": (self.batch, self.length),
                "embeds": (self.batch, self.length),
                "mask": (self.batch, self.total),
            }.get(port.role, ())
            for dim, size in zip(port.shape, known, strict=False):
                if isinstance(dim, str):
                    sizes.setdefault(dim, size)
        return sizes

    def _shape(self, port: Port) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else self._size(d) for d in port.shape)

    def _size(self, dim: str | None) -> int:
        if dim is None:
            return self.size
        return self.sizes.setdefault(dim, self.batch if dim.lower() in ("batch", "batch_size") else self.size)

    def _tokens(self, port: Port) -> np.ndarray:
        return self.tokens.astype(port.dtype)

    def _embeds(self, port: Port) -> np.ndarray:
        """Random vectors, the same for the same token."""
        width = port.shape[2] if isinstance(port.shape[2], int) else self.sig.config.hidden
        if width is None:
            raise InputError(
                f"input {port.name!r} {list(port.shape)}: the width is nowhere stated; put it in config.json"
            )
        ids, index = np.unique(self.tokens, return_inverse=True)
        rows = np.stack([np.random.default_rng(int(i)).standard_normal(width) for i in ids])
        return rows[index.reshape(self.tokens.shape)].astype(port.dtype)

    def _mask(self, port: Port) -> np.ndarray:
        seen = np.ones((self.batch, self.past.length), bool)
        if not self.sig.has_cache:
            return self.valid.astype(port.dtype)
        return np.concatenate([seen, self.valid], axis=1).astype(port.dtype)

    def _causal_mask(self, port: Port) -> np.ndarray:
        """[B, 1 or H, T, total]: 0 where a query may look and the lowest float where not; True and False for bool."""
        heads = port.shape[1] if isinstance(port.shape[1], int) else 1
        keys = np.concatenate([np.ones((self.batch, self.past.length), bool), self.valid], axis=1)
        causal = np.tri(self.length, self.total, self.past.length, dtype=bool)
        allowed = np.broadcast_to(causal & keys[:, None, None, :], (self.batch, heads, self.length, self.total))
        if port.dtype.kind != "f":
            return allowed.astype(port.dtype)
        return np.where(allowed, 0, np.finfo(port.dtype).min).astype(port.dtype)

    def _positions(self, port: Port) -> np.ndarray:
        if len(port.shape) == 1:
            return np.arange(self.past.length, self.total).astype(port.dtype)
        counted = self.past.length + np.maximum(np.cumsum(self.valid, axis=1) - 1, 0)
        if len(port.shape) == 3:  # multimodal rope: time, height, width
            axis = 0 if port.shape[0] == 3 else 2
            counted = np.stack([counted] * 3, axis=axis)
        return counted.astype(port.dtype)

    def _past(self, port: Port) -> np.ndarray:
        if port.name in self.past.values:
            return self.past.values[port.name]
        shape = self._cache_shape(port, self.capacity or self.past.length)
        return self._normal(shape, port.dtype) if self.random_past else np.zeros(shape, port.dtype)

    def _cache_shape(self, port: Port, positions: int) -> tuple[int, ...]:
        """[B, heads, positions, head size], with a leading 2 when keys and values are in one tensor."""
        config, rank = self.sig.config, len(port.shape)
        meaning = {rank - 4: self.batch, rank - 3: config.kv_heads, port.axis: positions}
        if port.axis != rank - 1:
            meaning[rank - 1] = config.head_size
        shape = [d if isinstance(d, int) and i != port.axis else meaning.get(i) for i, d in enumerate(port.shape)]
        if None in shape:
            raise InputError(
                f"input {port.name!r} {list(port.shape)}: the head size or the number of heads is nowhere stated;"
                " put genai_config.json or config.json beside the model"
            )
        return tuple(int(d) for d in shape if d is not None)

    def _state(self, port: Port) -> np.ndarray:
        if port.name in self.past.values:
            return self.past.values[port.name]
        return np.zeros(self._shape(port), port.dtype)

    def _use_cache(self, port: Port) -> np.ndarray:
        return np.full(self._shape(port), self.past.length > 0, port.dtype)

    def _keep_logits(self, port: Port) -> np.ndarray:
        return np.full(self._shape(port), self.keep or self.length, port.dtype)

    def _seqlens(self, port: Port) -> np.ndarray:
        lengths = self.past.length + self.valid.sum(axis=1) - 1
        return (lengths if len(port.shape) == 1 else lengths[:, None]).astype(port.dtype)

    def _total(self, port: Port) -> np.ndarray:
        return np.full(self._shape(port), self.total, port.dtype)

    def _past_length(self, port: Port) -> np.ndarray:
        return np.full(self._shape(port), self.past.length, port.dtype)

    def _other(self, port: Port) -> np.ndarray:
        shape = self._shape(port)
        if port.dtype.kind == "f":
            return self._normal(shape, port.dtype)
        if port.dtype.kind == "b" or "mask" in port.name.lower():
            return np.ones(shape, port.dtype)
        return self.rng.integers(0, 2, shape).astype(port.dtype)

    def _normal(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(dtype)


def _valid(batch: int, length: int, lengths: np.ndarray | None, pad: str) -> np.ndarray:
    """[B, T], True where a token is real."""
    if lengths is None:
        return np.ones((batch, length), bool)
    lengths = np.asarray(lengths)
    if lengths.shape != (batch,) or lengths.min() < 1 or lengths.max() > length:
        raise InputError(f"lengths {lengths.tolist()} must be {batch} numbers between 1 and {length}")
    right = np.arange(length) < lengths[:, None]
    return right if pad == "right" else right[:, ::-1]


def check_array(port: Port, array: np.ndarray, source: str) -> None:
    """Raise InputError unless the array has the type, the rank and the fixed sizes of the input."""
    fits = len(port.shape) == array.ndim and all(
        not isinstance(d, int) or d == n for d, n in zip(port.shape, array.shape, strict=True)
    )
    if array.dtype != port.dtype or not fits:
        raise InputError(
            f"input {port.name!r} takes {port.dtype} {_text(port.shape)}, but {source} give"
            f" {array.dtype} {list(array.shape)}"
        )


def _text(shape: tuple[int | str | None, ...]) -> str:
    return "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"

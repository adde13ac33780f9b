"""The calls of a calibration: windows of a text through a cache, or feeds as they are; and where each row belongs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nmonnx.calibration.taps import Tapped
from nmonnx.errors import InputError, RunError, UsageError
from nmonnx.feeds import Feed, Signature, make_feeds, vocabulary

_BUDGET, _FEWEST, _MOST = 256 << 20, 16, 256
"""Bytes of activations that one call may give, and the least and most tokens of a call."""


@dataclass(frozen=True)
class Call:
    """The activations of one call, by tensor name.

    index  [B * T]: the place of each token among all tokens; None when the call has no tokens
    sink   [B * T], bool: the first token of a window
    real   [B * T], bool: tokens that are no padding
    first  added to the place of rows that are not one per token
    where  which call it was, in words
    """

    values: Mapping[str, np.ndarray]
    index: np.ndarray | None
    sink: np.ndarray | None
    real: np.ndarray | None
    first: int
    where: str

    def rows(self, x: np.ndarray, before: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """The rows [R, K] that count, their places and which of them are sinks. Rows that are not one per token (a
        head that reads the last one only, an expert) all count, numbered on from the `before` ones."""
        if self.index is None or len(x) != len(self.index):
            return x, self.first + before + np.arange(len(x)), None
        if self.real is None or self.sink is None:
            return x, self.index, self.sink
        return x[self.real], self.index[self.real], self.sink[self.real]


class Calls(Protocol):
    """count     steps, after each of which the run can be cut
    each      how much of the progress a step is
    protocol  what is run, in words
    digest    of the tokens or arrays
    """

    count: int
    each: int
    protocol: str
    digest: str

    def run(self, step: int, names: Sequence[str]) -> Iterator[Call]:
        """The calls of one step with the tensors `names`. Raises RunError."""
        ...


@dataclass
class _Windows:
    """`rows` windows at a time, in calls of `piece` tokens, each from an empty cache."""

    tapped: Tapped
    sig: Signature
    tokens: np.ndarray
    window: int
    piece: int
    rows: int
    first: int

    def __post_init__(self) -> None:
        self.count = len(self.tokens) // (self.window * self.rows)
        self.each = self.window * self.rows
        self.tokens = self.tokens[: self.count * self.each].astype(np.int64)
        self.digest = f"{hashlib.sha256(self.tokens.tobytes()).hexdigest()} {self.piece}"
        windows = f"{self.count * self.rows} windows of {self.window} tokens"
        self.protocol = f"{windows}, empty cache, no BOS, first token of each left out"

    def run(self, step: int, names: Sequence[str]) -> Iterator[Call]:
        places = np.arange(step * self.each, (step + 1) * self.each).reshape(self.rows, self.window)
        presents = [present for _, present in self.sig.cache]
        past: dict[str, np.ndarray] = {}
        for start in range(0, self.window, self.piece):
            here = places[:, start : start + self.piece]
            sig = self.sig.without_cache() if past else self.sig
            arrays = make_feeds(sig, self.tokens[here], start) | past
            ends = start + self.piece >= self.window
            values = self._values(arrays, [*names, *([] if ends else presents)])
            if not ends:
                past = {name: values.pop(present) for name, present in self.sig.cache}
            where = f"in tokens {self.first + here[0, 0]} to {self.first + here[-1, -1]}"
            sink = np.zeros(here.shape, bool)
            sink[:, 0] = start == 0
            yield Call(values, self.first + here.reshape(-1), sink.reshape(-1), None, self.first, where)

    def _values(self, arrays: Mapping[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
        try:
            return self.tapped.run(arrays, names, only_these=True)
        except RunError as e:
            if "eshape" not in str(e):
                raise
            raise RunError(f"{e}; it may be traced for one length only, which the window must be then") from e


@dataclass
class _Feeds:
    tapped: Tapped
    sig: Signature
    feeds: list[Feed]
    first: int

    def __post_init__(self) -> None:
        self.count, self.each = len(self.feeds), 1
        digest = hashlib.sha256()
        for feed in self.feeds:
            for name, array in sorted(feed.arrays.items()):
                digest.update(f"{name} {array.dtype} {array.shape} ".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        self.digest = digest.hexdigest()
        self.protocol = f"{self.count} feeds, first token of each text left out"
        port = self.sig.first("tokens") or self.sig.first("embeds")
        self.shapes = [feed.arrays[port.name].shape[:2] if port else None for feed in self.feeds]
        sizes = [int(np.prod(shape)) if shape else 0 for shape in self.shapes]
        self.starts = np.cumsum([self.first, *sizes])

    def run(self, step: int, names: Sequence[str]) -> Iterator[Call]:
        feed, shape = self.feeds[step], self.shapes[step]
        values = self.tapped.run(feed.arrays, names, only_these=True)
        where = f"in feed {feed.name!r}"
        if shape is None:
            yield Call(values, None, None, None, self.first, where)
            return
        real = self._real(feed, shape)
        sink = np.zeros(shape, bool)
        if not self._follows(feed):
            sink[np.arange(shape[0]), real.argmax(axis=1)] = True
        index = np.arange(self.starts[step], self.starts[step + 1])
        yield Call(values, index, sink.reshape(-1), real.reshape(-1), self.first, where)

    def _real(self, feed: Feed, shape: tuple[int, ...]) -> np.ndarray:
        """[B, T], True for tokens that are no padding, as far as a mask [B, total] tells."""
        port = self.sig.first("mask")
        mask = feed.arrays[port.name] if port else None
        if mask is None or mask.shape[0] != shape[0] or mask.shape[1] < shape[1]:
            return np.ones(shape, bool)
        return mask[:, mask.shape[1] - shape[1] :] != 0

    def _follows(self, feed: Feed) -> bool:
        """Whether a cache holds tokens before those of the feed."""
        lengths = [int(feed.arrays[p.name].max(initial=0)) for p in self.sig.of("past_length")]
        ports = self.sig.of("past")
        mask = self.sig.first("mask")
        tokens = self.sig.first("tokens") or self.sig.first("embeds")
        if mask and tokens:
            lengths.append(feed.arrays[mask.name].shape[1] - feed.arrays[tokens.name].shape[1])
        elif not lengths:
            lengths = [feed.arrays[p.name].shape[p.axis] for p in ports]
        return max(lengths, default=0) > 0


def calls_of(
    tapped: Tapped,
    tokens: np.ndarray | None,
    feeds: Sequence[Feed | Mapping[str, np.ndarray]] | None,
    window: int,
    width: int,
    first: int = 0,
) -> Calls:
    """The calls of a text, as `window_calls`, or of feeds, as `feed_calls`. `width` channels are seen of every token;
    it decides how many tokens a call may hold."""
    sig = tapped.signature()
    if tokens is None:
        named = [f if isinstance(f, Feed) else Feed(f"feed {i}", dict(f)) for i, f in enumerate(feeds or ())]
        return feed_calls(tapped, sig, named, first)
    piece = min(max(_BUDGET // (4 * max(width, 1)), _FEWEST), _MOST)
    return window_calls(tapped, sig, tokens, window, piece, first)


def window_calls(tapped: Tapped, sig: Signature, tokens: np.ndarray, window: int, piece: int, first: int) -> Calls:
    """Windows of `tokens` [T], of at most `window` tokens and of what the graph allows. Raises InputError for a graph
    that token ids alone cannot drive and for a text that is no text of it, UsageError for a window that cannot be."""
    where = sig.path or "the model"
    strange = [p.name for p in sig.inputs if p.role in ("other", "embeds")]
    if sig.first("tokens") is None or strange:
        takes = f"also takes {', '.join(strange)}" if sig.first("tokens") else "takes no token ids [batch, length]"
        raise InputError(f"{where} {takes}, so text alone cannot drive it; give its inputs as feeds (.npz files)")
    if tokens.ndim != 1 or len(tokens) < 2 or tokens.dtype.kind not in "iu":
        raise InputError(f"the text must be two token ids or more [T], got {tokens.dtype} {list(tokens.shape)}")
    known = vocabulary(sig)
    if tokens.min() < 0 or tokens.max() >= known:
        raise InputError(
            f"the text has token ids from {int(tokens.min())} to {int(tokens.max())}, but the model knows 0 to"
            f" {known - 1}; give the tokenizer that belongs to the model"
        )
    rows, carried = sig.batch or 1, bool(sig.cache)
    window = min(window, sig.config.context or window, max(len(tokens) // rows, 1))
    if sig.length is not None:
        window = window // sig.length * sig.length if carried else sig.length
        if not window or window * rows > len(tokens):
            raise UsageError(
                f"{where} reads {rows} x {sig.length} tokens at a time, which is more than the window or the text"
                f" ({len(tokens)} tokens) has; give more"
            )
    return _Windows(tapped, sig, tokens, window, (sig.length or piece) if carried else window, rows, first)


def feed_calls(tapped: Tapped, sig: Signature, feeds: list[Feed], first: int) -> Calls:
    """The feeds as they are. Raises UsageError when there are none or one lacks an input."""
    wanted = {p.name for p in sig.inputs}
    for feed in feeds:
        if wanted - feed.arrays.keys():
            raise UsageError(f"feed {feed.name!r} lacks inputs {sorted(wanted - feed.arrays.keys())}")
    if not feeds:
        raise UsageError("there are no feeds to calibrate on")
    return _Feeds(tapped, sig, feeds, first)

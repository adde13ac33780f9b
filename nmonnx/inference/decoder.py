"""Run any decoder export token by token: with a KV cache, with a buffer written in place, or without a cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nmonnx.errors import InputError, UsageError
from nmonnx.feeds import Signature, signature, vocabulary
from nmonnx.inference.decoder_cache import Growing, InPlace, Rerun, Runner, writes_in_place
from nmonnx.library import make_session

if TYPE_CHECKING:
    import onnxruntime as ort

CHUNK = 512
"""Most tokens of one call; longer prompts go through the cache in even pieces, which bounds the memory of logits."""


class Decoder:
    """A language model and the tokens it has seen so far.

    path     the model, or None when a session was given alone
    sig      its inputs and outputs
    vocab    number of token ids
    context  most tokens it can see, None when nothing states a limit
    seen     tokens in the cache now
    """

    def __init__(
        self, model: str | Path | ort.InferenceSession, threads: int = 0, path: str | Path | None = None
    ) -> None:
        """Open the model file `model` with `threads` threads (0: all cores), or take an open session, with `path` the
        file it came from. Raises ModelError when the file does not load, InputError when it is not a text decoder."""
        if isinstance(model, (str, Path)):
            path = Path(model)
            session = make_session(path, threads)
        else:
            session = model
        self.sig = signature(session, path)
        self.path = self.sig.path
        _refuse(self.sig)
        self.vocab = vocabulary(self.sig)
        self.context = self.sig.config.context
        self._runner = _runner(session, self.sig)
        if isinstance(self._runner, Rerun) and self.sig.length:
            self.context = min(self.sig.length, self.context or self.sig.length)

    @property
    def seen(self) -> int:
        return self._runner.seen

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """Forget everything, read `tokens` [B, T]; the float32 logits [B, V] after the last one."""
        tokens = self._start(tokens)
        logits = None
        for piece in self._pieces(tokens, CHUNK):
            logits = self._runner.run(piece, keep=1)
        assert logits is not None  # _start refuses empty tokens
        return logits[:, -1]

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Read one more token of each row, `ids` [B]; the float32 logits [B, V] after it."""
        ids = np.asarray(ids)
        if ids.ndim != 1:
            raise InputError(f"step takes one token id for each row, not an array of shape {list(ids.shape)}")
        self._check_room(1)
        return self._runner.run(ids[:, None], keep=1)[:, -1]

    def read_on(self, tokens: np.ndarray) -> np.ndarray:
        """Read `tokens` [B, T] behind what is in the cache; the float32 logits [B, T, V] after each of them."""
        self._check_room(tokens.shape[1])
        pieces = self._pieces(tokens, 1 if self._runner.last_only else CHUNK)
        if tokens.shape[1] > 1 and tokens.shape[0] > 1 and isinstance(self._runner, InPlace):
            pieces = np.split(tokens, tokens.shape[1], axis=1)  # several rows go on token by token only
        return np.concatenate([self._runner.run(piece, keep=0) for piece in pieces], axis=1)

    def take_over(self, other: Decoder) -> None:
        """Go on where `other` stands, with a copy of its cache. Raises UsageError when the caches differ."""
        mine, given = self._runner, other._runner
        if self.sig.cache != other.sig.cache:
            raise UsageError(f"{self.path} and {other.path} have different caches; give conversions of one model")
        if isinstance(mine, Rerun) or type(mine) is not type(given):
            raise UsageError(f"{self.path} cannot go on with the cache of {other.path}; both need one of the same kind")
        mine.take(given)  # type: ignore[attr-defined]

    def score(self, tokens: np.ndarray) -> np.ndarray:
        """Forget everything, read `tokens` [B, T]; the float32 logits [B, T, V] after each of them."""
        return np.concatenate([logits for _, logits in self.score_pieces(tokens)], axis=1)

    def score_pieces(self, tokens: np.ndarray, chunk: int = CHUNK) -> Iterator[tuple[int, np.ndarray]]:
        """As `score`, but (first position, logits [B, t, V]) piece by piece of at most `chunk` tokens, so that long
        texts need little memory. A graph without a cache gives one piece."""
        tokens = self._start(tokens)
        pieces = self._pieces(tokens, 1 if self._runner.last_only else chunk)
        if self._runner.last_only and any(piece.shape[1] > 1 for piece in pieces):
            raise InputError("the graph has no cache and gives logits of the last position only; it cannot be scored")
        start = 0
        for piece in pieces:
            yield start, self._runner.run(piece, keep=0)
            start += piece.shape[1]

    def _start(self, tokens: np.ndarray) -> np.ndarray:
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not tokens.size:
            raise InputError(f"tokens must be a filled [batch, length] matrix, not of shape {list(tokens.shape)}")
        if tokens.min() < 0:
            raise InputError(f"token id {int(tokens.min())} is negative")
        self._runner.reset()
        self._check_room(tokens.shape[1])
        return tokens

    def _check_room(self, count: int) -> None:
        if self.context is not None and self.seen + count > self.context:
            raise InputError(
                f"{self.seen + count} tokens are more than the {self.context} that {self.path or 'the model'} can see;"
                " shorten the text"
            )

    def _pieces(self, tokens: np.ndarray, chunk: int) -> list[np.ndarray]:
        batch, length = tokens.shape
        if self.sig.has_cache and self.sig.length:
            if length % self.sig.length:
                raise InputError(
                    f"{length} tokens: the graph reads {self.sig.length} at a time, so only multiples of that can be"
                    " read; export it with a dynamic length"
                )
            return np.split(tokens, length // self.sig.length, axis=1)
        return np.array_split(tokens, -(-length // self._runner.piece(batch, length, chunk)), axis=1)


def _refuse(sig: Signature) -> None:
    """Raise InputError when the graph is not a decoder that token ids alone can drive."""
    name = str(sig.path or "the model")
    logits, tokens = sig.first("logits"), sig.first("tokens")
    if tokens is None:
        given = ", ".join(f"{p.name} {list(p.shape)}" for p in sig.inputs) or "nothing"
        raise InputError(
            f"{name} takes no token ids [batch, length] (its inputs: {given}); give a text decoder exported with them"
        )
    strange = [p.name for p in sig.inputs if p.role in ("other", "embeds")]
    if strange:
        raise InputError(f"{name} also takes {', '.join(strange)}, which text alone cannot fill")
    if logits is None or len(logits.shape) != 3:
        raise InputError(f"{name} has no logits output [batch, length, vocabulary]; give a model with its head")
    width, known = logits.shape[2], sig.config.vocab
    if "logits" not in logits.name and isinstance(width, int) and known and width != known:
        raise InputError(f"{name} ends in {logits.name!r} of width {width}, not in logits; give a model with its head")
    if sig.has_cache and not sig.cache:
        raise InputError(f"{name} takes a cache but no output continues it; give the decoder with past and present")


def _runner(session: ort.InferenceSession, sig: Signature) -> Runner:
    if not sig.has_cache:
        return Rerun(session, sig)
    return InPlace(session, sig) if writes_in_place(sig) else Growing(session, sig)

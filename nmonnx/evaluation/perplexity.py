"""Perplexity of a text under a model, over windows, so that two models can be compared window by window."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nmonnx.errors import InputError, UsageError
from nmonnx.inference.decoder import Decoder

_ROWS = 256  # log-softmax rows at a time, which bounds its memory
_PIECE = 256  # tokens of a call, which bounds the memory of the logits


@dataclass(frozen=True)
class Perplexity:
    """nll        mean negative log-likelihood of a predicted token, in nats
    ppl         exp(nll)
    tokens      predicted tokens
    windows     windows read
    window_nll  mean over each window's predicted tokens: pair it with another model's on the same windows
    protocol    how it was measured, in words
    window_tokens  predicted tokens of each window
    """

    nll: float
    ppl: float
    tokens: int
    windows: int
    window_nll: tuple[float, ...]
    protocol: str
    window_tokens: tuple[int, ...]


def perplexity(
    decoder: Decoder,
    tokens: np.ndarray,
    window: int = 1024,
    stride: int | None = None,
    max_windows: int | None = None,
    batch: int = 1,
    progress: Callable[[int, int], None] | None = None,
    skip_windows: int = 0,
    on_best: Callable[[np.ndarray], None] | None = None,
) -> Perplexity:
    """Cut `tokens` [T] into windows of `window` that start every `stride` tokens (default: one after another), read
    each from an empty cache without a BOS, and average the negative log-likelihood of each token given those before
    it in its window. With overlap, a token that an earlier window predicted is context only. The tail that fills no
    window is left out; a text shorter than one window is one window. The first `skip_windows` windows are left out, and
    no token of theirs is predicted. `progress` is called with (windows done, all), `on_best` for one window after
    another with the most probable token [n], int32, at each of the positions that count. Raises InputError for texts
    below two tokens or token ids beyond the model's vocabulary, UsageError for windows that cannot be."""
    tokens = np.asarray(tokens)
    stride = stride or window
    starts, window = cut_windows(tokens, window, stride, max_windows, decoder, skip_windows)
    sums: list[float] = []
    counts: list[int] = []
    for first in range(0, len(starts), batch):
        group = starts[first : first + batch]
        rows = np.stack([tokens[s : s + window] for s in group])
        best = np.empty((len(group), window - 1), np.int32) if on_best else None
        losses = window_losses(decoder, rows, best)
        for index, (row, begin) in enumerate(zip(losses, group, strict=True)):
            old = 0 if begin == 0 else max(window - stride - 1, 0)
            fresh = row[old:]
            if on_best and best is not None:
                on_best(best[index, old:])
            sums.append(float(fresh.sum()))
            counts.append(len(fresh))
        if progress:
            progress(first + len(group), len(starts))
    nll = math.fsum(sums) / sum(counts)
    return Perplexity(
        nll=nll,
        ppl=math.exp(min(nll, 700.0)),
        tokens=sum(counts),
        windows=len(starts),
        window_nll=tuple(s / n for s, n in zip(sums, counts, strict=True)),
        protocol=f"{len(starts)} windows of {window} tokens, stride {stride}, empty cache, no BOS",
        window_tokens=tuple(counts),
    )


def window_losses(decoder: Decoder, rows: np.ndarray, best: np.ndarray | None = None) -> np.ndarray:
    """Negative log-likelihood [B, T - 1] of tokens 1..T-1 of each row [B, T], float64, given the ones before. `best`,
    an array of the same shape, is filled with the most probable tokens; ties go to the lowest id."""
    losses = np.zeros((rows.shape[0], rows.shape[1] - 1))
    for start, logits in decoder.score_pieces(rows, _PIECE):
        end = min(start + logits.shape[1], losses.shape[1])
        targets = rows[:, start + 1 : end + 1]
        if best is not None:
            best[:, start:end] = logits[:, : end - start].argmax(axis=-1)
        for row in range(rows.shape[0]):
            losses[row, start:end] = negative_log_likelihood(logits[row, : end - start], targets[row])
    return losses


def cut_windows(
    tokens: np.ndarray, window: int, stride: int, max_windows: int | None, decoder: Decoder, skip: int = 0
) -> tuple[list[int], int]:
    """Where the windows of `tokens` [T] start, and their length. Raises as `perplexity` does."""
    if window < 2 or not 1 <= stride <= window:
        raise UsageError(f"window {window} must be at least 2 and stride {stride} between 1 and the window")
    if max_windows is not None and max_windows < 1:
        raise UsageError(f"{max_windows} windows are too few; read at least one")
    if skip < 0:
        raise UsageError(f"{skip} windows cannot be skipped; give 0 or more")
    if decoder.context is not None and window > decoder.context:
        raise UsageError(f"a window of {window} tokens is more than the {decoder.context} that the model can see")
    if tokens.ndim != 1 or len(tokens) < 2:
        raise InputError(f"perplexity needs a text of two tokens or more, got shape {list(tokens.shape)}")
    if tokens.max() >= decoder.vocab:
        raise InputError(
            f"the text has token id {int(tokens.max())}, but the model knows ids below {decoder.vocab}; give the"
            " tokenizer that belongs to the model"
        )
    window = min(window, len(tokens))
    starts = list(range(0, len(tokens) - window + 1, stride))
    if skip >= len(starts):
        raise UsageError(f"the text has {len(starts)} windows of {window} tokens, so {skip} cannot be skipped")
    return starts[skip:][:max_windows], window


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """[T] from logits [T, V] and token ids [T]; float32 softmax, a few rows at a time."""
    losses = np.empty(len(targets))
    for start in range(0, len(targets), _ROWS):
        rows, wanted = logits[start : start + _ROWS], targets[start : start + _ROWS, None]
        shifted = rows - rows.max(axis=1, keepdims=True)
        picked = np.take_along_axis(shifted, wanted, axis=1)[:, 0]
        losses[start : start + _ROWS] = np.log(np.exp(shifted).sum(axis=1, dtype=np.float64)) - picked
    return losses

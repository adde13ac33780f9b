"""One model reads the beginning of a text, another goes on with its cache: what sparse prefill or decoding alone costs.

The two models must be of one original, so that their caches mean the same: the dense one and its conversion.
"""

from __future__ import annotations

import numpy as np

from nmonnx.errors import UsageError
from nmonnx.evaluation.perplexity import negative_log_likelihood
from nmonnx.inference.decoder import Decoder

_PIECE = 256


def second_part_losses(
    first: Decoder, second: Decoder, rows: np.ndarray, split: int, one_by_one: bool = False
) -> np.ndarray:
    """Negative log-likelihood [B, T - split - 1], float64, of tokens split + 1..T - 1 of `rows` [B, T]: `first` reads
    the `split` tokens before from an empty cache, `second` the others, `one_by_one` or in pieces. The token at `split`
    itself is predicted by `first` and does not count.

    Sparse prefill with dense decoding is (sparse, dense), the reverse (dense, sparse); both may be one model twice.
    Raises UsageError for a split outside the rows or caches that do not fit, and what the decoders raise.
    """
    rows = np.asarray(rows)
    length = rows.shape[1]
    if not 1 <= split <= length - 2:
        raise UsageError(f"split {split} must leave a token before it and two behind it of {length}")
    first.prefill(rows[:, :split])
    second.take_over(first)
    losses = np.empty((len(rows), length - split - 1))
    step = 1 if one_by_one else _PIECE
    for start in range(split, length - 1, step):
        end = min(start + step, length - 1)
        logits = second.read_on(rows[:, start:end])
        for row, values in enumerate(logits):
            losses[row, start - split : end - split] = negative_log_likelihood(values, rows[row, start + 1 : end + 1])
    return losses

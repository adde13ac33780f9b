"""What pruning costs in each phase: the loss on the second part of each window when the first was read otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from nmonnx.errors import UsageError
from nmonnx.evaluation.handover import second_part_losses
from nmonnx.evaluation.intervals import mean_error
from nmonnx.evaluation.perplexity import cut_windows
from nmonnx.inference.decoder import Decoder


@dataclass(frozen=True)
class Phase:
    """first, second  the models that read the first and the second part of each window
    loss        mean negative log-likelihood of the second part, nats per token
    difference  loss above that of the first model alone, and its standard error over windows (None for one window)
    """

    first: Path
    second: Path
    loss: float
    difference: float
    error: float | None


def phases(
    models: Sequence[Path],
    tokens: np.ndarray,
    split: int,
    window: int = 1024,
    windows: int = 8,
    skip: int = 0,
    threads: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Phase, ...]:
    """The first of `models` beside each other one, which is to be its conversion: alone and in both mixtures. The first
    `split` tokens of a window are read by one, the others by the other, which goes on with its cache.

    Raises UsageError for windows that do not fit or caches that cannot be handed over, and what reading raises.
    """
    dense = models[0]
    if len(models) < 2:
        raise UsageError("--split needs a dense model and a conversion of it; give both")
    pairs = list(dict.fromkeys(pair for other in models[1:] for pair in product((dense, other), repeat=2)))
    losses: dict[tuple[Path, Path], np.ndarray] = {}
    for number, (first, second) in enumerate(pairs):
        readers = [Decoder(path, threads=threads) for path in dict.fromkeys((first, second))]
        starts, length = cut_windows(tokens, window, window, windows, readers[0], skip)
        rows = [np.asarray(tokens[start : start + length], np.int64)[None] for start in starts]
        losses[first, second] = np.array([second_part_losses(readers[0], readers[-1], r, split).mean() for r in rows])
        if progress:
            progress("phases", number + 1, len(pairs))
    base = losses[dense, dense]
    return tuple(Phase(*pair, float(loss.mean()), *mean_error(loss - base)) for pair, loss in losses.items())

"""One training loop for both regimes, and the text that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nmonnx.errors import InputError
from nmonnx.evaluation.perplexity import cut_windows
from nmonnx.feeds import Signature, make_feeds
from nmonnx.inference.decoder import Decoder
from nmonnx.learn.ops import tensor_of
from nmonnx.learn.settings import Settings


@dataclass(frozen=True)
class Text:
    """train and held are windows [W, T] of token ids; `logits` names the output that predicts."""

    sig: Signature
    logits: str
    train: np.ndarray
    held: np.ndarray

    def feeds(self, row: np.ndarray) -> dict[str, Tensor]:
        return {name: tensor_of(np.asarray(v)) for name, v in make_feeds(self.sig, row[None], 0).items()}


def read_windows(model_path: str | Path, tokens: np.ndarray, settings: Settings) -> Text:
    """Cut `tokens` [T] in windows: the last `held_out` of them to judge, the others to train on, spread over the text.
    Raises InputError for a text of fewer than two windows, and what `cut_windows` raises."""
    decoder = Decoder(model_path, threads=1)
    rows = cut_rows(decoder, tokens, settings.window)
    if len(rows) < 2:
        raise InputError(f"the text has one window of {rows.shape[1]} tokens; learning needs two, one to judge on")
    cut = min(len(rows) - 1, max(1, round(len(rows) * (1 - settings.held_out))))
    logits = decoder.sig.first("logits")
    assert logits is not None  # Decoder refuses a graph without
    return Text(decoder.sig, logits.name, spread(rows[:cut], settings.windows), rows[cut:][: settings.held_windows])


def cut_rows(decoder: Decoder, tokens: np.ndarray, window: int) -> np.ndarray:
    """`tokens` [T] in windows [W, window], the tail left out. Raises what `cut_windows` raises."""
    tokens = np.asarray(tokens, np.int64)
    starts, window = cut_windows(tokens, window, window, None, decoder)
    return np.stack([tokens[s : s + window] for s in starts])


def spread(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the windows, spread over all."""
    return rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)]


def train(
    parameters: Iterable[Tensor],
    loss: Callable[[int], Tensor],
    count: int,
    settings: Settings,
    after: Callable[[int, torch.optim.Optimizer], None] | None = None,
    begin: Callable[[torch.optim.Optimizer], int] | None = None,
) -> None:
    """Lower `loss(window)` over `count` windows, in an order that the seed determines. `after` sees every window;
    `begin` may restore the optimiser and says which window is next."""
    chosen = [p for p in parameters if p.requires_grad]
    optimiser = torch.optim.AdamW(chosen, settings.rate, settings.betas, weight_decay=settings.weight_decay)
    rng = np.random.default_rng(settings.seed)
    order = np.concatenate([rng.permutation(count) for _ in range(settings.epochs)])
    first = begin(optimiser) if begin else 0
    for place in range(first, len(order)):
        (loss(int(order[place])) / settings.accumulate).backward()
        if (place + 1) % settings.accumulate == 0 or place + 1 == len(order):
            for group in optimiser.param_groups:
                group["lr"] = settings.rate * _share(place, len(order), settings)
            torch.nn.utils.clip_grad_norm_(chosen, settings.clip)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if after:
            after(place + 1, optimiser)


def _share(place: int, total: int, settings: Settings) -> float:
    """Of the rate: up to 1 over the warm-up, then down to 0."""
    warm = max(1, round(settings.warm_up * total))
    return min((place + 1) / warm, (total - place) / max(1, total - warm))

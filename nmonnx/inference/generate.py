"""Continue a prompt, greedily or by sampling, and measure how long reading and writing took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from nmonnx.errors import InputError, RunError, UsageError
from nmonnx.inference.decoder import Decoder
from nmonnx.inference.text import encode

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: the most probable one, or, above temperature 0, at random.

    temperature  divides the logits; 0 is greedy
    top_k        draw among the k most probable tokens only; 0: all
    top_p        draw among the most probable tokens that together reach this probability; 1: all
    seed         of the random numbers
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or not np.isfinite(self.temperature):
            raise UsageError(f"temperature {self.temperature} must be a number from 0 up")
        if self.top_k < 0:
            raise UsageError(f"top-k {self.top_k} must be from 0 up")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p {self.top_p} must be above 0 and at most 1")
        if self.seed < 0:
            raise UsageError(f"seed {self.seed} must be from 0 up")


@dataclass
class Generation:
    """What came out of a prompt and what it took.

    text             the continuation, without the prompt
    prompt_tokens    token ids of the prompt
    tokens           token ids written, without the end token
    ended            whether the model wrote an end token
    prefill_seconds  reading the prompt, up to the logits of the first new token
    decode_seconds   of the `steps` calls that each read one new token
    """

    text: str = ""
    prompt_tokens: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: int = 0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens read per second."""
        return len(self.prompt_tokens) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens read per second, one call each; 0 when there were none."""
        return self.steps / self.decode_seconds if self.decode_seconds else 0.0


def generate(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    eos: tuple[int, ...] | None = None,
    special: bool = True,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue `prompt` until an end token (`eos`; default: what the files beside the model say), `max_new_tokens`, or
    the end of the model's context. `special` lets the tokenizer add its own marks (often a BOS) to the prompt;
    `on_text` gets every piece of text as it is written. Raises InputError when the prompt is empty, too long, or of
    another vocabulary than the model's."""
    ids = encode(tokenizer, prompt, special)
    if not ids.size:
        raise InputError("the prompt is empty; give at least one token")
    if ids.max() >= decoder.vocab:
        raise InputError(
            f"the tokenizer gives token id {int(ids.max())}, but the model knows ids below {decoder.vocab}; give the"
            " tokenizer that belongs to the model"
        )
    result = Generation(prompt_tokens=ids.tolist())
    ends = set(decoder.sig.config.eos if eos is None else eos)
    given, written = len(tokenizer.decode(ids.tolist())), ""
    for token in _tokens(decoder, ids, max_new_tokens, sampling or Sampling(), result):
        if token in ends:
            result.ended = True
            break
        result.tokens.append(token)
        result.text = tokenizer.decode(result.prompt_tokens + result.tokens)[given:]  # keeps the space in between
        if on_text and not result.text.endswith("\ufffd"):  # a character may take several tokens
            on_text(result.text[len(written) :])
            written = result.text
    if on_text and result.text != written:
        on_text(result.text[len(written) :])
    return result


def _tokens(decoder: Decoder, prompt: np.ndarray, count: int, sampling: Sampling, timing: Generation) -> Iterator[int]:
    rng = np.random.default_rng(sampling.seed)
    start = time.perf_counter()
    logits = decoder.prefill(prompt[None])
    timing.prefill_seconds = time.perf_counter() - start
    for number in range(count):
        token = pick(logits[0], sampling, rng)
        yield token
        if number + 1 == count or (decoder.context is not None and decoder.seen >= decoder.context):
            return
        start = time.perf_counter()
        logits = decoder.step(np.array([token]))
        timing.decode_seconds += time.perf_counter() - start
        timing.steps += 1


def pick(logits: np.ndarray, sampling: Sampling, rng: np.random.Generator) -> int:
    """The next token from its logits [V]; ties of the greedy choice go to the lowest id. Raises RunError for NaN."""
    if np.isnan(logits).any():
        raise RunError("the model gave NaN logits; check its weights, or convert it with fewer sites pruned")
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    probabilities = candidates(logits, sampling)
    return int(rng.choice(len(probabilities), p=probabilities))


def candidates(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probability [V] of each token to be drawn, float64: temperature first, then top-k, then top-p on what is left."""
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = np.exp(scaled[order] - scaled[order[0]])
    weights /= weights.sum()
    before = np.cumsum(weights) - weights
    kept = before < sampling.top_p  # the token that crosses the limit is in
    kept[0] = True
    probabilities = np.zeros(len(logits))
    probabilities[order[kept]] = weights[kept] / weights[kept].sum()
    return probabilities

"""Compare what two language models write and how well they predict a text."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nmonnx.errors import InputError, RunError, UsageError
from nmonnx.evaluation.perplexity import Perplexity, perplexity
from nmonnx.feeds import Feed, make_feeds, signature
from nmonnx.inference.decoder import Decoder
from nmonnx.inference.text import encode
from nmonnx.validate.outputs import run_feeds
from nmonnx.validate.result import GREEDY, PPL_RATIO, Check, LanguageRecord, Thresholds, held

if TYPE_CHECKING:
    import onnxruntime as ort
    from tokenizers import Tokenizer

_PROMPTS, _PROMPT_LENGTH = 4, 16
_FEEDS, _FEED_LENGTH = 4, 64


@dataclass(frozen=True)
class Language:
    """What both models are asked: continue prompts greedily by `new_tokens`, and, with a text and its tokenizer,
    predict it in at most `max_windows` windows (None: all) of `window` tokens. Without a text the prompts are random.
    Raises UsageError for a text without a tokenizer."""

    tokenizer: Tokenizer | None = None
    text: str | None = None
    new_tokens: int = 16
    window: int = 512
    max_windows: int | None = 8

    def __post_init__(self) -> None:
        if self.text is not None and self.tokenizer is None:
            raise UsageError("a text was given without a tokenizer; give the tokenizer.json of the model too")


@dataclass(frozen=True)
class Task:
    """The same with the text as token ids, and the seed of the random prompts."""

    asked: Language
    text: np.ndarray | None
    seed: int


@dataclass(frozen=True)
class Answer:
    """What one model did; `reason` says why something could not be done."""

    written: np.ndarray | None = None
    ppl: Perplexity | None = None
    reason: str = ""


def make_task(asked: Language, seed: int) -> Task:
    tokenizer, text = asked.tokenizer, asked.text
    return Task(asked, encode(tokenizer, text) if tokenizer is not None and text is not None else None, seed)


def text_feeds(session: ort.InferenceSession, path: Path, task: Task) -> list[Feed]:
    """Pieces of the text as feeds, evenly spread; none when there is no text or the model takes no such calls."""
    sig = signature(session, path)
    length = sig.length or _FEED_LENGTH
    if task.text is None or sig.first("tokens") is None or len(task.text) < length:
        return []
    pieces = [np.repeat(piece[None], sig.batch or 1, axis=0) for piece in _spread(task.text, _FEEDS, length)]
    try:
        feeds = [Feed(f"text {i}", make_feeds(sig, piece)) for i, piece in enumerate(pieces)]
        run_feeds(session, path, feeds[:1])
    except (InputError, RunError):
        return []
    return feeds


def ask(session: ort.InferenceSession, path: Path, task: Task) -> Answer:
    """Give the task to a model; one that is no decoder answers with the reason."""
    try:
        decoder = Decoder(session, path=path)
        written = _continue(decoder, task) if task.asked.new_tokens else None
    except (InputError, RunError) as e:
        return Answer(reason=str(e))
    if task.text is None:
        return Answer(written)
    window = min(task.asked.window, decoder.context or task.asked.window)
    return Answer(written, perplexity(decoder, task.text, window, max_windows=task.asked.max_windows))


def compare_answers(old: Answer, new: Answer, limits: Thresholds) -> tuple[LanguageRecord, list[Check]]:
    record, checks = LanguageRecord(), []
    if old.written is not None and new.written is not None:
        count, length = old.written.shape
        share = float(_equal_prefix(old.written, new.written).mean() / length)
        record = replace(record, greedy=share, prompts=count, new_tokens=length)
        detail = f"of {length} tokens, up to the first difference, mean of {count} prompts"
        checks.append(held("greedy", GREEDY, share, limits, detail))
    if old.ppl is not None and new.ppl is not None:
        steps = np.subtract(new.ppl.window_nll, old.ppl.window_nll)
        error = float(steps.std(ddof=1) / math.sqrt(len(steps))) if len(steps) > 1 else None
        record = replace(
            record,
            ppl_original=old.ppl.ppl,
            ppl_converted=new.ppl.ppl,
            ppl_error=error,
            protocol=new.ppl.protocol,
        )
        ratio = math.exp(min(new.ppl.nll - old.ppl.nll, 700.0))
        detail = f"{old.ppl.ppl:.4g} -> {new.ppl.ppl:.4g}; {new.ppl.protocol}"
        checks.append(held("ppl_ratio", PPL_RATIO, ratio, limits, detail))
    return record, checks


def _continue(decoder: Decoder, task: Task) -> np.ndarray:
    """Greedy continuations [prompts, new tokens]."""
    prompts = _prompts(decoder, task)
    room = task.asked.new_tokens if decoder.context is None else decoder.context - prompts.shape[1]
    if room < 1:
        raise InputError(f"the model sees {decoder.context} tokens, which leaves no room for a continuation")
    picked = decoder.prefill(prompts).argmax(axis=-1)
    written = [picked]
    for _ in range(min(task.asked.new_tokens, room) - 1):
        picked = decoder.step(picked).argmax(axis=-1)
        written.append(picked)
    return np.stack(written, axis=1)


def _prompts(decoder: Decoder, task: Task) -> np.ndarray:
    """Pieces of the text, evenly spread, or random tokens: [prompts, length]."""
    count = decoder.sig.batch or _PROMPTS
    length = decoder.sig.length or min(_PROMPT_LENGTH, max(1, (decoder.context or _PROMPT_LENGTH * 2) // 2))
    if task.text is None or len(task.text) < length:
        return np.random.default_rng(task.seed).integers(0, decoder.vocab, (count, length))
    return _spread(task.text, count, length)


def _spread(tokens: np.ndarray, count: int, length: int) -> np.ndarray:
    starts = np.linspace(0, len(tokens) - length, count).astype(int)
    return np.stack([tokens[start : start + length] for start in starts])


def _equal_prefix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How many tokens of each row are equal before the first difference."""
    return (np.cumsum(a != b, axis=1) == 0).sum(axis=1)

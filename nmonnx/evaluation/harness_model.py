"""An ONNX decoder as a model of lm-evaluation-harness. Imports lm_eval: go through `nmonnx.evaluation.harness`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nmonnx.errors import InputError, UsageError
from nmonnx.evaluation.perplexity import negative_log_likelihood
from nmonnx.inference.decoder import Decoder
from nmonnx.inference.generate import Sampling, pick
from nmonnx.inference.text import encode

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_LOGIT_BYTES = 256 << 20  # of one call, which bounds the rows that are read side by side
_CONTEXT = 2048  # tokens of a window where the model states no limit
_NEW_TOKENS = 256  # of a continuation, where the task states no limit


class OnnxModel(TemplateLM):  # type: ignore[misc]
    """Log-likelihoods and greedy continuations. The tokenizer puts its own marks (often a BOS) in front of a text, as
    the harness does with transformers; a text that is too long loses its beginning.

    batch     most rows of one call; shorter rows are padded at the end, where a decoder cannot see it. 1 for models
              whose activations are quantised over all rows at once
    progress  called with (requests done, all)
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        batch: int = 16,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__()
        self._decoder, self._words, self._progress = decoder, tokenizer, progress
        self._batch = decoder.sig.batch or batch
        self._marks = encode(tokenizer, "", special=True).tolist()

    @property
    def eot_token_id(self) -> int:
        """The end token; token 0 where no file beside the model names one."""
        return next(iter(self._decoder.sig.config.eos), 0)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the tokenizer's own first mark, else the end token."""
        return self._marks[0] if self._marks else self.eot_token_id

    @property
    def max_length(self) -> int:
        return self._decoder.context or _CONTEXT

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text. Raises InputError for ids that the model does not know."""
        ids = encode(self._words, string, special=add_special_tokens is not False).tolist()
        if max(ids, default=0) >= self._decoder.vocab:
            raise InputError(
                f"the tokenizer gives token id {max(ids)}, but the model knows ids below {self._decoder.vocab}; give"
                " the tokenizer that belongs to the model"
            )
        return ids

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Of each whole text, cut into windows of the model's context that predict every token once."""
        totals = []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text, add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            pairs = [(("", ""), *make_disjoint_window(w)) for w in windows]
            totals.append(sum(loss for loss, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Greedy continuations, one after another. Raises UsageError for a task that samples."""
        texts = []
        for number, (context, options) in enumerate(request.args for request in requests):
            if options.get("do_sample") and options.get("temperature", 1.0) != 0:
                raise UsageError("the task draws tokens at random, but evaluation is greedy; set do_sample: false")
            until = options.get("until") or []
            stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
            texts.append(self._continue(context, stops, int(options.get("max_gen_toks", _NEW_TOKENS))))
            self._tell(number + 1, len(requests))
        return texts

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding would write it) of each continuation: [(texts, ids of the
        context, ids of the continuation)]. Rows of like lengths are read together."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        room = self.max_length
        rows = [((*context, *wanted)[-(room + 1) :], min(len(wanted), room)) for _, context, wanted in requests]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        start = 0
        while start < len(order):
            longest = len(rows[order[start]][0]) - 1
            fit = max(1, _LOGIT_BYTES // (4 * self._decoder.vocab * max(longest, 1)))
            group = order[start : start + min(self._batch, fit)]
            for index, score in zip(group, self._read([rows[i] for i in group]), strict=True):
                found[index] = score
            start += len(group)
            self._tell(start, len(order))
        return found

    def _read(self, rows: list[tuple[tuple[int, ...], int]]) -> list[tuple[float, bool]]:
        """Of each (token ids, number of predicted ids at their end)."""
        length = max(len(ids) for ids, _ in rows) - 1
        if length < 1:
            return [(0.0, True)] * len(rows)
        tokens = np.zeros((len(rows), length), np.int64)
        for row, (ids, _) in zip(tokens, rows, strict=True):
            row[: len(ids) - 1] = ids[:-1]
        sums, greedy = np.zeros(len(rows)), np.ones(len(rows), bool)
        for start, logits in self._decoder.score_pieces(tokens):
            for index, (ids, count) in enumerate(rows):
                first = max(len(ids) - 1 - count, start)
                end = min(len(ids) - 1, start + logits.shape[1])
                if first >= end:
                    continue
                part, targets = logits[index, first - start : end - start], np.array(ids[first + 1 : end + 1])
                sums[index] -= negative_log_likelihood(part, targets).sum()
                greedy[index] &= bool((part.argmax(-1) == targets).all())
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))

    def _continue(self, context: str, stops: list[str], count: int) -> str:
        room = self.max_length - count
        if room < 1:
            raise UsageError(
                f"the task writes {count} tokens, but the model sees {self.max_length}; lower max_gen_toks"
            )
        ids = (self.tok_encode(context) or [self.prefix_token_id])[-room:]
        ends = set(self._decoder.sig.config.eos)
        given, written, text = len(self._words.decode(ids)), [], ""
        logits = self._decoder.prefill(np.array([ids]))
        for number in range(count):
            token = pick(logits[0], Sampling(), np.random.default_rng(0))
            if token in ends:
                break
            written.append(token)
            text = self._words.decode(ids + written)[given:]
            if any(stop in text for stop in stops):
                break
            if number + 1 < count:
                logits = self._decoder.step(np.array([token]))
        for stop in stops:
            text = text.partition(stop)[0]
        return text

    def _tell(self, done: int, total: int) -> None:
        if self._progress:
            self._progress(done, total)

"""Three ways to keep what a decoder has seen: a growing cache, a buffer written in place, or the tokens themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import onnx

from nmonnx.errors import RunError
from nmonnx.feeds import Signature, make_feeds
from nmonnx.feeds.sample import explain

if TYPE_CHECKING:
    import onnxruntime as ort

_LEAST_CAPACITY = 256


class Runner(Protocol):
    """last_only: the graph gives logits of the last position of a call only."""

    last_only: bool

    @property
    def seen(self) -> int:
        """Tokens read since the last reset."""
        ...

    def reset(self) -> None: ...

    def piece(self, batch: int, length: int, wanted: int) -> int:
        """Tokens of each call for a prompt of `length` when `wanted` would be best."""
        ...

    def run(self, tokens: np.ndarray, keep: int) -> np.ndarray:
        """Read `tokens` [B, T]; float32 logits [B, T, V], or of the last `keep` positions where the graph can."""
        ...


class Growing:
    """Every call's present is the next call's past."""

    def __init__(self, session: ort.InferenceSession, sig: Signature) -> None:
        self._session, self._sig, self._small = session, sig, sig.without_cache()
        self._outputs = [_logits_name(sig), *(present for _, present in sig.cache)]
        self.last_only = _last_only(sig)
        self.reset()

    def reset(self) -> None:
        self.seen = 0
        self._past: dict[str, np.ndarray] = {}

    def take(self, other: Growing) -> None:
        self.seen, self._past = other.seen, dict(other._past)

    def piece(self, batch: int, length: int, wanted: int) -> int:
        return wanted

    def run(self, tokens: np.ndarray, keep: int) -> np.ndarray:
        arrays = make_feeds(self._small if self._past else self._sig, tokens, self.seen, keep=keep)
        try:
            logits, *present = self._session.run(self._outputs, arrays | self._past, _quiet())
        except Exception as e:
            raise _failure(self._sig, tokens, self.seen, e) from e
        self._past = {past: value for (past, _), value in zip(self._sig.cache, present, strict=True)}
        self.seen += tokens.shape[1]
        return _checked(self._sig, logits, tokens)


class InPlace:
    """GroupQueryAttention writes keys and values into one buffer that is both its past and its present."""

    def __init__(self, session: ort.InferenceSession, sig: Signature) -> None:
        self._session, self._sig, self._small = session, sig, sig.without_cache()
        self._binding = session.io_binding()
        self._buffers: dict[str, np.ndarray] = {}
        self._batch = self._capacity = self.seen = 0
        self.last_only = _last_only(sig)

    def reset(self) -> None:
        self.seen = 0

    def take(self, other: InPlace) -> None:
        if self is other:
            return
        self.seen = 0
        self._make_room(other._batch, other.seen)
        for name, values in other._buffers.items():
            self._buffers[name][:, :, : other.seen] = values[:, :, : other.seen]
        self.seen = other.seen

    def piece(self, batch: int, length: int, wanted: int) -> int:
        # GroupQueryAttention refuses several tokens after a past for several rows
        return wanted if batch == 1 or wanted == 1 else length

    def run(self, tokens: np.ndarray, keep: int) -> np.ndarray:
        self._make_room(tokens.shape[0], self.seen + tokens.shape[1])
        arrays = make_feeds(self._small, tokens, self.seen, keep=keep)
        for name, array in arrays.items():
            self._binding.bind_cpu_input(name, array)
        self._binding.bind_output(_logits_name(self._sig), "cpu")  # a new array: its shape changes from call to call
        try:
            self._session.run_with_iobinding(self._binding, _quiet())
        except Exception as e:
            raise _failure(self._sig, tokens, self.seen, e) from e
        self.seen += tokens.shape[1]
        return _checked(self._sig, self._binding.get_outputs()[0].numpy(), tokens)

    def _make_room(self, batch: int, needed: int) -> None:
        """Bind buffers that hold `needed` positions, twice as many when outgrown, so that copies are rare."""
        if batch == self._batch and needed <= self._capacity:
            return
        grown = self._buffers if self.seen else {}
        context = self._sig.config.context or 2 * needed
        self._batch = batch
        self._capacity = max(needed, self._sig.config.window or 0, min(context, max(2 * needed, _LEAST_CAPACITY)))
        token = np.zeros((batch, 1), np.int64)
        arrays = make_feeds(self._sig, token, capacity=self._capacity)
        self._buffers = {past: arrays[past] for past, _ in self._sig.cache}
        for port in self._sig.of("past"):
            if port.name in grown:
                old = grown[port.name]
                self._buffers[port.name][:, :, : old.shape[2]] = old
        self._bind_buffers()

    def _bind_buffers(self) -> None:
        from onnxruntime import OrtValue

        self._binding = self._session.io_binding()
        self._binding.bind_output(_logits_name(self._sig), "cpu")
        for past, present in self._sig.cache:
            value = OrtValue.ortvalue_from_numpy(self._buffers[past])
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(present, value)


class Rerun:
    """No cache: every call reads all tokens again, padded on the right when the graph has one length only."""

    def __init__(self, session: ort.InferenceSession, sig: Signature) -> None:
        self._session, self._sig = session, sig
        self.last_only = _last_only(sig)
        self.reset()

    @property
    def seen(self) -> int:
        return self._tokens.shape[1]

    def reset(self) -> None:
        self._tokens = np.zeros((0, 0), np.int64)

    def piece(self, batch: int, length: int, wanted: int) -> int:
        return length

    def run(self, tokens: np.ndarray, keep: int) -> np.ndarray:
        batch, length = tokens.shape
        before = self._tokens if self.seen else np.zeros((batch, 0), np.int64)
        self._tokens = np.concatenate([before, tokens], axis=1)
        pad = max((self._sig.length or 0) - self.seen, 0)
        padded = np.pad(self._tokens, ((0, 0), (0, pad)))
        arrays = make_feeds(self._sig, padded, 0, np.full(batch, self.seen))
        try:
            logits = self._session.run([_logits_name(self._sig)], arrays, _quiet())[0]
        except Exception as e:
            raise _failure(self._sig, self._tokens, 0, e) from e
        logits = _checked(self._sig, logits, padded)
        return logits if self.last_only else logits[:, self.seen - length : self.seen]


def writes_in_place(sig: Signature) -> bool:
    """Whether GroupQueryAttention alone reads every cache input, so that a buffer larger than the text will do."""
    if sig.path is None or any(len(p.shape) != 4 for p in sig.of("past")) or sig.of("state"):
        return False
    past = {name for name, _ in sig.cache}
    readers = [n for n in onnx.load(sig.path, load_external_data=False).graph.node if past & set(n.input)]
    read = {name for n in readers for name in n.input}
    return bool(past) and past <= read and all(n.op_type == "GroupQueryAttention" for n in readers)


def _logits_name(sig: Signature) -> str:
    logits = sig.first("logits")
    assert logits is not None  # Decoder refuses graphs without logits
    return logits.name


def _last_only(sig: Signature) -> bool:
    logits = sig.first("logits")
    return logits is not None and logits.shape[1] == 1 and sig.length != 1


def _quiet() -> ort.RunOptions:
    from onnxruntime import RunOptions

    options = RunOptions()
    options.log_severity_level = 4  # a failure is raised with its reason, not logged as well
    return options


def _failure(sig: Signature, tokens: np.ndarray, seen: int, error: Exception) -> RunError:
    reason = explain(error)
    hint = "; it may be traced for one length only, export it with dynamic axes" if "eshape" in reason else ""
    return RunError(
        f"{sig.path or 'the model'} failed on tokens of shape {list(tokens.shape)} after {seen}: {reason}{hint}"
    )


def _checked(sig: Signature, logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The logits in float32, or RunError when they are not one row per token (or one of the last)."""
    batch, length = tokens.shape
    if logits.shape[0] != batch or logits.shape[1] not in (length, 1):
        raise RunError(
            f"{sig.path or 'the model'} gave logits of shape {list(logits.shape)} for tokens of shape"
            f" {list(tokens.shape)}; it is not a decoder that can be scored"
        )
    return logits.astype(np.float32, copy=False)

"""A model that is measured: its session, and calls of it that are ready to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort

from nmonnx.errors import InputError
from nmonnx.feeds import Signature, make_feeds, signature, vocabulary
from nmonnx.feeds.sample import explain
from nmonnx.feeds.signature import Port
from nmonnx.inference.decoder_cache import writes_in_place
from nmonnx.library import make_session
from nmonnx.report import counted


@dataclass(frozen=True)
class Case:
    """A call of `tokens` tokens in one row behind `past` others, with `threads` threads inside an operator."""

    threads: int
    tokens: int
    past: int

    @property
    def calls(self) -> str:
        """Without the threads, in words."""
        return counted(self.tokens, "token") + (f" after {self.past}" if self.past else "")

    def __str__(self) -> str:
        return f"{self.calls}, {counted(self.threads, 'thread')}"


class Subject:
    """An open model.

    reads_text     it takes token ids or embeddings
    has_length     the number of tokens of a call is free: for a graph that reads no text the last free size of an input
    only_length    the one number of tokens that a call may have, None when it is free
    """

    def __init__(self, path: Path, threads: int, options: ort.SessionOptions | None = None) -> None:
        """Raises InputError and ModelError."""
        options = options or ort.SessionOptions()
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads run on beside the other
        self.path, self.session = path, make_session(path, threads, options=options)
        self.sig = signature(self.session, path)
        self.vocabulary = vocabulary(self.sig)
        self.reads_text = any(self.sig.first(role) is not None for role in ("tokens", "embeds"))
        self.only_length = self.sig.length if self.reads_text else None
        free = any(not isinstance(d, int) for p in self.sig.inputs for d in p.shape)
        self.has_length = self.only_length is None if self.reads_text else free
        self._in_place = writes_in_place(self.sig)

    @property
    def context(self) -> int | None:
        """Most tokens it can see, None when nothing states a limit."""
        return self.sig.config.context

    def call(self, tokens: int, past: int, vocabulary: int) -> Callable[[], object]:
        """A call on random inputs, the same for every model with the same inputs and `vocabulary`, bound and run once.
        Raises InputError with the reason when the model does not run it."""
        try:
            run = partial(self.session.run_with_iobinding, *self._bound(self.feeds(tokens, past, vocabulary)))
            run()
        except InputError:
            raise
        except Exception as e:  # onnxruntime's exceptions have no common base
            raise InputError(explain(e)) from e
        return run

    def feeds(self, tokens: int, past: int, vocabulary: int) -> dict[str, np.ndarray]:
        """Arrays for the inputs. Raises InputError when their fixed sizes forbid the case."""
        rng = np.random.default_rng(0)
        ids = rng.integers(0, vocabulary, (self.sig.batch or 1, tokens))
        if self.reads_text:
            capacity = past + tokens if self._in_place else None
            return make_feeds(self.sig, ids, past, capacity=capacity, rng=rng, keep=1)
        return make_feeds(_with_length(self.sig, tokens), ids, rng=rng)

    def _bound(self, arrays: dict[str, np.ndarray]) -> tuple[ort.IOBinding, ort.RunOptions]:
        """Inputs and outputs where the calls shall find them; a cache that is written in place is both."""
        binding, quiet = self.session.io_binding(), ort.RunOptions()
        quiet.log_severity_level = 4  # a call that fails is told with its reason
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        shared = {present: values[past] for past, present in self.sig.cache} if self._in_place else {}
        for port in self.sig.outputs:
            if port.name in shared:
                binding.bind_ortvalue_output(port.name, shared[port.name])
            else:
                binding.bind_output(port.name, "cpu")
        return binding, quiet


def _with_length(sig: Signature, tokens: int) -> Signature:
    """The inputs of a graph that reads no text, one row: the last free size of each is the number of tokens."""
    return replace(sig, inputs=tuple(replace(p, shape=_shape(p, tokens)) for p in sig.inputs))


def _shape(port: Port, tokens: int) -> tuple[int, ...]:
    free = [axis for axis, dim in enumerate(port.shape) if not isinstance(dim, int)]
    return tuple(d if isinstance(d, int) else tokens if axis == free[-1] else 1 for axis, d in enumerate(port.shape))

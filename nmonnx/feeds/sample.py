"""A set of feeds that exercises a graph the ways an LLM is used, as far as the graph allows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from nmonnx.errors import InputError, RunError
from nmonnx.feeds.make import Past, make_feeds
from nmonnx.feeds.signature import Signature, signature

if TYPE_CHECKING:
    import onnxruntime as ort

_SMALL_VOCABULARY = 16
_DRAWS = 8

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Feed:
    """The arrays of one call, by input name; `name` says what the call exercises."""

    name: str
    arrays: Arrays


@dataclass(frozen=True)
class Samples:
    """Feeds that the graph ran, and what it could not run with the reason."""

    feeds: list[Feed] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def sample_feeds(
    session: ort.InferenceSession,
    model_path: str | Path | None,
    rng: np.random.Generator,
    length: int = 12,
    batch: int = 2,
) -> list[Feed]:
    """The feeds of `plan_feeds`. Raises RunError when the graph runs none of them."""
    samples = plan_feeds(session, model_path, rng, length, batch)
    if not samples.feeds:
        raise RunError(f"{model_path or 'the model'} ran with none of the sampled inputs: {samples.skipped[0][1]}")
    return samples.feeds


def plan_feeds(
    session: ort.InferenceSession,
    model_path: str | Path | None,
    rng: np.random.Generator,
    length: int = 12,
    batch: int = 2,
) -> Samples:
    """Run the graph on random tokens and keep what it takes:

    1. `prompt`: one row with an empty cache; when that fails, at the lengths that constants of the graph suggest
       (a trace that baked its shape in);
    2. `decode`: one token on the cache that the prompt left; `continue`: several;
    3. `batch`: `batch` rows; `ragged`: rows of different lengths, padded on the left and on the right.

    A graph without tokens gets random arrays, twice with different symbolic sizes. Raises InputError for a graph
    whose inputs cannot be made (a paged cache).
    """
    sig = signature(session, model_path)
    if sig.first("tokens") is None and sig.first("embeds") is None:
        return _plain(session, sig, rng)
    return _Plan(session, sig, rng, sig.length or length, sig.batch or batch).run()


def vocabulary(sig: Signature) -> int:
    """Number of token ids that are safe to feed: from the logits, the JSON files or the embedding table; 16 when none
    of them tells."""
    logits = sig.first("logits")
    if logits and "logits" in logits.name and len(logits.shape) == 3 and isinstance(logits.shape[2], int):
        return logits.shape[2]
    tokens = sig.first("tokens")
    rows = _embedding_rows(sig.path, tokens.name) if sig.path and tokens else None
    return sig.config.vocab or rows or _SMALL_VOCABULARY


def explain(error: Exception) -> str:
    """One sentence of an ONNX Runtime error: the node and what it complained about."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(
        r"Non-zero status code returned while running (\w+) node\. Name:'([^']*)' Status Message: ", r"\1 \2: ", text
    )
    text = re.sub(r"/\S+?\.(h|cc|cpp):\d+ .*?\) ", "", text)
    return text if len(text) < 400 else text[:400] + "..."


class _Plan:
    """Tries cases one by one on a session and keeps the feeds that ran."""

    def __init__(
        self, session: ort.InferenceSession, sig: Signature, rng: np.random.Generator, length: int, batch: int
    ) -> None:
        self.session, self.sig, self.rng, self.batch, self.length = session, sig, rng, batch, length
        self.vocabulary = vocabulary(sig)
        self.samples = Samples()

    def run(self) -> Samples:
        outputs = self._prompt()
        if outputs is None:
            return self.samples
        if self.sig.has_cache:
            self._decode(outputs)
        if self.batch > 1:
            self._keep("batch", lambda: self._make(self._tokens(self.batch, self.length)))
            self._ragged("right")
            self._ragged("left")
        return self.samples

    def _prompt(self) -> Arrays | None:
        """The outputs of one row with an empty cache, at the first length that runs; sets that length."""
        rows, reason = self.sig.batch or 1, ""
        for length in self._lengths():
            self.length = length
            tried = self._try(lambda: self._make(self._tokens(rows, self.length)))
            if not isinstance(tried, str):
                self.samples.feeds.append(Feed("prompt", tried[0]))
                return tried[1]
            reason = reason or tried
        self.samples.skipped.append(("prompt", reason))
        return None

    def _lengths(self) -> Iterator[int]:
        yield self.length
        if self.sig.length is None:
            yield from (n for n in _baked_lengths(self.sig.path) if n != self.length)

    def _decode(self, prompt: Arrays) -> None:
        rows = self.sig.batch or 1
        past = Past(self.length, {a: self._filled(a, prompt[b]) for a, b in self.sig.cache})
        if not past.values:
            self.samples.skipped.append(("decode", "no output is the next value of the cache inputs"))
            return
        if self.sig.length is None:
            self._keep("decode", lambda: self._make(self._tokens(rows, 1), past))
        self._keep("continue", lambda: self._make(self._tokens(rows, self.sig.length or self.length), past))

    def _filled(self, name: str, present: np.ndarray) -> np.ndarray:
        """The cache with zeros where a buffer larger than the text was left unwritten."""
        port = next(p for p in self.sig.inputs if p.name == name)
        if port.role == "past":
            present = present.copy()
            np.moveaxis(present, port.axis, 0)[self.length :] = 0
        return present

    def _ragged(self, pad: str) -> None:
        lengths = self.rng.integers(max(1, self.length // 2), self.length, self.batch)
        lengths[0] = self.length
        masked = any(p.role in ("mask", "causal_mask", "seqlens") for p in self.sig.inputs)
        if not masked:
            self.samples.skipped.append((f"ragged-{pad}", "no input masks padding"))
            return
        self._keep(
            f"ragged-{pad}",
            lambda: make_feeds(self.sig, self._tokens(self.batch, self.length), 0, lengths, pad, rng=self.rng),
        )

    def _make(self, tokens: np.ndarray, past: Past | int = 0) -> Arrays:
        return make_feeds(self.sig, tokens, past, rng=self.rng)

    def _tokens(self, rows: int, length: int) -> np.ndarray:
        return self.rng.integers(0, self.vocabulary, (rows, length))

    def _keep(self, name: str, make: Callable[[], Arrays]) -> None:
        tried = self._try(make)
        if isinstance(tried, str):
            self.samples.skipped.append((name, tried))
        else:
            self.samples.feeds.append(Feed(name, tried[0]))

    def _try(self, make: Callable[[], Arrays]) -> tuple[Arrays, Arrays] | str:
        """Inputs that ran with their outputs, or the reason why not. A case is drawn again when it fails: a trace of
        a mixture of experts runs only when every expert gets a token."""
        reason = ""
        for _ in range(_DRAWS):
            try:
                arrays = make()
                return arrays, _run(self.session, arrays)
            except InputError as e:
                return str(e)
            except Exception as e:
                reason = explain(e)
        return reason


def _plain(session: ort.InferenceSession, sig: Signature, rng: np.random.Generator) -> Samples:
    """Random arrays for a graph that is not a language model."""
    samples = Samples()
    symbolic = any(not isinstance(d, int) for p in sig.inputs for d in p.shape)
    for size in (3, 5) if symbolic else (3,):
        arrays = make_feeds(sig, np.zeros((size, size), np.int64), rng=rng, size=size)
        try:
            _run(session, arrays)
        except Exception as e:
            samples.skipped.append((f"random-{size}", explain(e)))
        else:
            samples.feeds.append(Feed(f"random-{size}", arrays))
    return samples


def _run(session: ort.InferenceSession, arrays: Arrays) -> Arrays:
    import onnxruntime

    quiet = onnxruntime.RunOptions()
    quiet.log_severity_level = 4  # a refused case is a result here, not an error to log
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, arrays, quiet), strict=True))


def _baked_lengths(path: Path | None) -> list[int]:
    """Sizes above 1 in constant Reshape targets, most frequent first: a traced sequence length is among them."""
    counts: dict[int, int] = {}
    for graph in _graphs(path):
        constants = {t.name: t for t in graph.initializer}
        constants |= {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant" and n.attribute}
        for node in graph.node:
            target = constants.get(node.input[1]) if node.op_type == "Reshape" else None
            if target is not None and target.data_type == onnx.TensorProto.INT64 and not target.external_data:
                for size in onnx.numpy_helper.to_array(target).reshape(-1).tolist():
                    if 1 < size <= 4096:
                        counts[size] = counts.get(size, 0) + 1
    return sorted(counts, key=lambda n: -counts[n])[:8]


def _embedding_rows(path: Path | None, tokens: str) -> int | None:
    """Rows of the table that a Gather reads with the tokens."""
    for graph in _graphs(path):
        rows = {t.name: t.dims[0] for t in graph.initializer if len(t.dims) == 2}
        ids = {tokens}
        for node in graph.node:
            if node.op_type in ("Reshape", "Cast", "Identity", "Unsqueeze") and node.input[0] in ids:
                ids.add(node.output[0])
            elif node.op_type.startswith("Gather") and node.input[1] in ids and node.input[0] in rows:
                return rows[node.input[0]]
    return None


def _graphs(path: Path | None) -> Iterator[onnx.GraphProto]:
    """The main graph and the bodies inside it."""
    if path is None or not path.is_file():
        return
    stack = [onnx.load(path, load_external_data=False).graph]
    while stack:
        graph = stack.pop()
        yield graph
        stack += [a.g for n in graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH]

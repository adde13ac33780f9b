"""How much the predictions change when one activation alone is pruned, for every activation that would be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import AttributeProto, ModelProto, NodeProto

import nmonnx
from nmonnx.convert import rewrite
from nmonnx.errors import ModelError, RunError, UsageError
from nmonnx.evaluation.metrics import log_softmax
from nmonnx.evaluation.perplexity import cut_windows
from nmonnx.feeds.sample import explain
from nmonnx.inference.decoder import Decoder
from nmonnx.onnx_file.graph import DOMAIN, Model
from nmonnx.onnx_file.identity import model_sha256
from nmonnx.onnx_file.skeleton import open_skeleton, point_at_files
from nmonnx.onnx_file.weave import weave
from nmonnx.progress import Step
from nmonnx.pruning.recipe import Recipe
from nmonnx.records.sensitivity import Checkpoint, Sensitivity, SiteSensitivity

__all__ = ["Sensitivity", "SiteSensitivity", "measure"]

_PIECE = 256  # tokens of a call
_ROWS = 64  # rows of logits at a time, which bounds the memory of what is computed from them


def measure(
    model_path: str | Path,
    recipe: Recipe,
    tokens: np.ndarray,
    window: int = 512,
    windows: int = 2,
    threads: int = 0,
    checkpoint: str | Path | None = None,
    progress: Step | None = None,
) -> Sensitivity:
    """Prune each activation that `recipe` would prune (one that several layers read: for all of them), all others
    being dense, and compare with the dense model on the first `windows` windows of `tokens` [T], each read from an
    empty cache without a BOS: KL over every position, log-loss over every predicted token.

    The recipe's kernel and fallback do not matter: layers stay as they are, behind an `NMPrune`. Nothing is written
    but `checkpoint`: each activation's numbers at once, so that another call with the same model, text, pattern and
    windows goes on there. It is left for the caller to remove. The dense log-probabilities are kept in memory,
    windows x window x vocabulary x 4 bytes. `progress` is called with (activations done, all).

    Raises what `convert` raises for the recipe, InputError for a text or a model that cannot be scored, ModelError
    when the model does not load, RunError when it fails or gives NaN.
    """
    if recipe.emulated:
        raise UsageError(f"sensitivity is measured by NMPrune, which does not do {recipe.pattern}; give N:M")
    model, done = rewrite(model_path, replace(recipe, kernel="prune"))
    switched = _Switched(model)
    decoder = switched.decoder((), threads)
    starts, window = cut_windows(np.asarray(tokens), window, window, windows, decoder)
    rows = np.stack([np.asarray(tokens, np.int64)[s : s + window] for s in starts])
    source = model_sha256(Path(model_path))
    stored = Checkpoint(Path(checkpoint) if checkpoint else None, _key(model, source, recipe, rows))
    left = [group for group in switched.groups if stored.get(group) is None]
    dense = _Dense(decoder, rows) if left else None
    del decoder
    for index, group in enumerate(left):
        if progress:
            progress(len(switched.groups) - len(left) + index, len(switched.groups))
        assert dense is not None
        stored.put(group, dense.against(switched.decoder(group, threads)))
    if progress:
        progress(len(switched.groups), len(switched.groups))
    groups = {name: group for group in switched.groups for name in group}
    sites = {}
    for site in done.selection.chosen:
        numbers = stored.get(groups[site.name])
        assert numbers is not None  # measured above
        sites[site.name] = SiteSensitivity(*numbers, groups[site.name], site.role, site.block, site.k, site.n)
    protocol = f"one activation pruned at a time, {len(rows)} windows of {window} tokens, empty cache, no BOS"
    return Sensitivity(source, recipe.pattern, protocol, sites)


class _Switched:
    """A converted model whose prunes are switched on and off: off they are Identity, which ONNX Runtime removes.

    groups  names of the sites behind each prune, in the order of the graph
    """

    def __init__(self, model: Model) -> None:
        self._path = model.path
        self._proto = weave(model)
        point_at_files(self._proto, model.tensors)
        self._prunes: dict[tuple[str, ...], _Prune] = {}
        for node in _nodes(self._proto):
            if (node.domain, node.op_type) == (DOMAIN, "NMPrune"):
                notes = {p.key: p.value for p in node.metadata_props}
                on = NodeProto()
                on.CopyFrom(node)
                self._prunes[tuple(json.loads(notes["nmonnx.site"]))] = _Prune(node, on)
        self.groups = tuple(self._prunes)

    def decoder(self, group: tuple[str, ...], threads: int) -> Decoder:
        """The model with this group's prune alone; with none for (). Raises ModelError, and InputError when it is no
        text decoder."""
        import onnxruntime

        for sites, prune in self._prunes.items():
            prune.switch(sites == group)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            session = open_skeleton(self._proto, options)
        except Exception as e:  # onnxruntime's exceptions have no common base
            raise ModelError(f"ONNX Runtime cannot load {self._path}: {explain(e)}") from e
        return Decoder(session, path=self._path)


@dataclass(frozen=True)
class _Prune:
    node: NodeProto
    on: NodeProto

    def switch(self, on: bool) -> None:
        self.node.CopyFrom(self.on)
        if not on:
            self.node.op_type, self.node.domain = "Identity", ""
            del self.node.attribute[:]


class _Dense:
    """What the dense model predicts after every token of the windows `rows` [W, T]."""

    def __init__(self, decoder: Decoder, rows: np.ndarray) -> None:
        self._rows = rows
        self._pieces = []
        for where, logits in _scored(decoder, rows):
            predictions = np.concatenate([log_softmax(some) for some in _some_rows(logits)])
            if np.isnan(predictions).any():
                raise RunError(f"{decoder.path} gives NaN for this text, so nothing can be compared with it")
            self._pieces.append((where, predictions))

    def against(self, decoder: Decoder) -> tuple[float, float]:
        """(mean KL, increase of the mean negative log-likelihood) of another model, nats per token."""
        kl = nll = 0.0
        for ((window, start), dense), (_, logits) in zip(self._pieces, _scored(decoder, self._rows), strict=True):
            targets = self._rows[window, start + 1 : start + 1 + len(dense)]
            for at, (p, some) in enumerate(zip(_some_rows(dense), _some_rows(logits), strict=True)):
                q = log_softmax(some)
                kl += _kl(p, q)
                wanted = targets[at * _ROWS : at * _ROWS + len(p), None]
                change = _picked(p, wanted) - _picked(q, wanted)
                nll += float(change.sum())
        count = self._rows.size
        kl, nll = max(kl / count, 0.0), nll / (count - len(self._rows))
        if not (np.isfinite(kl) and np.isfinite(nll)):
            raise RunError(f"{decoder.path} gives NaN or infinite predictions once an activation is pruned")
        return kl, nll


def _scored(decoder: Decoder, rows: np.ndarray) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """((window, first position), logits [t, V]) piece by piece."""
    for window, row in enumerate(rows):
        for start, logits in decoder.score_pieces(row[None], _PIECE):
            yield (window, start), logits[0]


def _some_rows(matrix: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(matrix), _ROWS):
        yield matrix[start : start + _ROWS]


def _kl(p: np.ndarray, q: np.ndarray) -> float:
    """Sum over rows of KL(p || q), from log-probabilities [T, V]; equal rows give exactly 0."""
    with np.errstate(invalid="ignore"):
        terms = p - q
        terms *= np.exp(p)
    terms[np.isneginf(p)] = 0.0  # tokens that the dense model rules out
    return float(terms.sum(dtype=np.float64))


def _picked(log_p: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """float64 [t] log-probabilities of the tokens `wanted` [t, 1]; the last row of a window has none."""
    return np.take_along_axis(log_p[: len(wanted)], wanted, axis=1)[:, 0].astype(np.float64)


def _nodes(proto: ModelProto) -> Iterator[NodeProto]:
    yield from _nodes_in(proto.graph.node)
    for function in proto.functions:
        if function.domain != DOMAIN:
            yield from _nodes_in(function.node)


def _nodes_in(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _nodes_in(attribute.g.node)


def _key(model: Model, source: str, recipe: Recipe, rows: np.ndarray) -> dict[str, Any]:
    """What a checkpoint must agree with: model, weights, text, pattern and windows."""
    return {
        "version": nmonnx.__version__,
        "source": source,
        "data": model.data_stamps(),
        "pattern": str(recipe.pattern),
        "windows": list(rows.shape),
        "tokens": hashlib.sha256(rows.tobytes()).hexdigest(),
    }

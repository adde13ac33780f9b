"""Measure how the loss depends on what the linear layers read, for the Fisher estimate of what pruning costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nmonnx.errors import InputError, UsageError
from nmonnx.feeds import Signature
from nmonnx.feeds.make import make_feeds
from nmonnx.inference.decoder import Decoder
from nmonnx.learn.torch_graph import TorchGraph
from nmonnx.learn.training import cut_rows, spread
from nmonnx.onnx_file.graph import load
from nmonnx.onnx_file.identity import model_sha256
from nmonnx.progress import Step
from nmonnx.records.gradients import Gradients, SiteGradient
from nmonnx.sites import Site, find_sites


def measure_gradients(
    model_path: str | Path,
    tokens: np.ndarray,
    window: int = 256,
    windows: int = 16,
    sample: int = 256,
    progress: Step | None = None,
) -> Gradients:
    """The gradient of the log-loss of a text by the input of every linear layer of the dense model.

    The text `tokens` [T] is read in at most `windows` windows of `window` tokens, spread over it, each from an empty
    cache without a BOS. Of each window as many tokens are kept, never its first one, the attention sink, that there are
    about `sample` of them in the end. `progress` is called with (windows done, all).

    Raises UsageError for an operator that torch does not handle here, or when no layer can be reached, InputError when
    the text is shorter than a window.
    """
    path = Path(model_path)
    model = load(path)
    graph = TorchGraph(model)
    sites = [site for site in find_sites(model).sites if graph.reaches(site)]
    if not sites:
        raise UsageError(f"{path}: no linear layer lies in the main graph, where its gradient could be taken")
    if len(tokens) < window:
        raise InputError(f"the text has {len(tokens)} tokens, fewer than one window of {window}; give a longer text")
    decoder = Decoder(path, threads=1)
    rows = spread(cut_rows(decoder, tokens, window), windows)
    each = max(1, min(window - 1, round(sample / len(rows))))
    places = np.unique(np.linspace(1, window - 1, each).round()).astype(int)
    seen: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {site.name: [] for site in sites}
    for number, row in enumerate(rows):
        for name, pair in _one_window(graph, decoder.sig, sites, row, places).items():
            seen[name].append(pair)
        if progress:
            progress(number + 1, len(rows))
    made = {
        name: SiteGradient.of(*(np.concatenate(part) for part in zip(*pairs, strict=True)))
        for name, pairs in seen.items()
        if pairs
    }
    protocol = f"log-loss of {len(rows)} windows of {window} tokens, {len(places)} tokens of each, empty cache, no BOS"
    return Gradients(made, model_sha256(path), protocol)


def _one_window(
    graph: TorchGraph, sig: Signature, sites: Sequence[Site], row: np.ndarray, places: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(x, gradient) of each site at `places` of one window."""
    leaves: dict[str, Tensor] = {}

    def watch(site: Site):  # type: ignore[no-untyped-def]
        def own_leaf(x: Tensor) -> Tensor:
            own = x if x.requires_grad else x.requires_grad_()
            own = own.clone()  # every site has a gradient of its own, though several read one activation
            own.retain_grad()
            leaves[site.name] = own
            return own

        return own_leaf

    port = sig.first("logits")
    assert port is not None  # Decoder refuses a graph without
    feeds = make_feeds(sig, row[None])
    logits = graph.run(feeds, [port.name], inputs={site: watch(site) for site in sites})[port.name]
    logits = logits.reshape(-1, logits.shape[-1])
    F.cross_entropy(logits[:-1], torch.from_numpy(row[1:]), reduction="sum").backward()
    found = {}
    for site in sites:
        x = leaves.get(site.name)
        if x is not None and x.grad is not None and x.numel() == len(row) * site.k:
            at = (part.detach().reshape(-1, site.k)[places].numpy() for part in (x, x.grad))
            found[site.name] = (next(at), next(at))
    return found

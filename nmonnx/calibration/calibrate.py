"""`calibrate`: run the original model over a text and see what its linear layers read."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nmonnx.calibration.calls import Call, calls_of
from nmonnx.calibration.taps import Tapped
from nmonnx.convert import refuse_converted
from nmonnx.errors import InputError, RunError, UsageError
from nmonnx.feeds import Feed
from nmonnx.onnx_file.graph import Model, load
from nmonnx.onnx_file.identity import model_sha256
from nmonnx.records.accumulator import Accumulator
from nmonnx.records.archive import read_archive, write_archive
from nmonnx.records.stats import Seen, Stats
from nmonnx.sites import Site, find_sites

SAVE_EVERY = 30.0
"""Seconds between two checkpoints."""

_INSIDE = "inside a subgraph or function, whose tensors cannot be seen from outside"


def calibrate(
    model_path: str | Path,
    tokens: np.ndarray | None = None,
    feeds: Sequence[Feed | Mapping[str, np.ndarray]] | None = None,
    window: int = 1024,
    max_tokens: int | None = None,
    sample: int = 512,
    threads: int = 0,
    checkpoint: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    first: int = 0,
    label: str = "",
) -> Stats:
    """Statistics of the input of every linear layer of the model at `model_path`, seen on `tokens` [T] or on `feeds`.

    1. The text is read in windows of `window` tokens (fewer where the model sees fewer), each from an empty cache
       without a BOS, in calls of at most 256 tokens. The tail that fills no window is left out; a text shorter than one
       window is one window. `max_tokens` is the most that are read.
    2. Feeds are run as they are. Padding that their mask tells of does not count.
    3. Memory does not grow with the number of tokens: sums, and a `sample` of so many tokens of each activation.
    4. With `checkpoint`, a file that is written every 30 s and removed at the end, a run that was cut short and is
       started again with the same model, text and settings goes on where it was.
    5. For a shard of a longer text `first` is the place of its first token; see `Stats.merge`.

    `progress` is told (done, all) in tokens, or in feeds; `label` names the text in the protocol. Layers that could
    not be seen are in `Stats.unseen` with the reason.

    Raises UsageError for a converted model and for arguments that do not fit, InputError for a model or a text that
    cannot be used, RunError when the model fails or an activation is not finite.
    """
    _check_arguments(tokens, feeds, window, max_tokens, sample)
    path = Path(model_path)
    model = load(path)
    refuse_converted(model, "calibrate")
    tally = _tally(model, sample)
    tapped = Tapped(path, model.proto, model.tensors, tally.sites, threads)
    text = None if tokens is None else np.asarray(tokens)[:max_tokens]
    calls = calls_of(tapped, text, feeds, window, sum(sites[0].k for sites in tally.sites.values()), first)
    source = model_sha256(path)
    settings = [source, model.data_stamps(), calls.digest, calls.protocol, sample, first, list(tally.sites)]
    state = _State(Path(checkpoint) if checkpoint else None, hashlib.sha256(json.dumps(settings).encode()).hexdigest())
    for done in range(state.resume(tally), calls.count):
        for call in calls.run(done, list(tally.sites)):
            tally.see(call, path)
        state.keep(tally, done + 1)
        if progress:
            progress((done + 1) * calls.each, calls.count * calls.each)
    state.forget()
    return tally.stats(source, f"{label}: {calls.protocol}" if label else calls.protocol)


def _check_arguments(tokens: object, feeds: object, window: int, max_tokens: int | None, sample: int) -> None:
    if (tokens is None) == (feeds is None):
        raise UsageError("calibration needs a text or feeds, one of them")
    if window < 2 or sample < 1 or (max_tokens is not None and max_tokens < 2):
        raise UsageError(
            f"window {window} and max_tokens {max_tokens} must be at least 2, and sample {sample} at least 1"
        )


@dataclass
class _Tally:
    """What was seen so far. `sites` are those of each tapped activation, by its name."""

    sites: dict[str, list[Site]]
    size: int
    unseen: dict[str, str]
    sums: dict[str, Accumulator] = field(default_factory=dict)

    def see(self, call: Call, path: Path) -> None:
        for name, sites in self.sites.items():
            x, sums = call.values[name], self.sums[name]
            if x.ndim == 0 or x.shape[-1] != sums.k:
                reason = f"its activation has shape {list(x.shape)}, not {sums.k} channels in the last axis"
                self.unseen |= {site.name: reason for site in sites}
                continue
            try:
                sums.add(*call.rows(x.reshape(-1, sums.k), sums.rows))
            except ValueError as e:
                raise RunError(
                    f"{path}: tensor {name!r}, which layer {sites[0].name!r} reads, has {e} {call.where}; statistics of"
                    " them would be meaningless"
                ) from e

    def stats(self, source: str, protocol: str) -> Stats:
        seen: dict[str, Seen] = {}
        unseen = dict(self.unseen)
        for name, sites in self.sites.items():
            own = Seen.of(self.sums[name])
            for site in sites:
                if site.name in unseen:
                    continue
                if own.tokens:
                    seen[site.name] = own
                else:
                    unseen[site.name] = "no token reached it"
        return Stats(seen, source, protocol, unseen)


def _tally(model: Model, size: int) -> _Tally:
    """The activations to tap, and the layers whose activation cannot be."""
    graph = model.proto.graph
    visible = {i.name for i in graph.input} | {name for node in graph.node for name in node.output}
    sites: dict[str, list[Site]] = {}
    unseen = {}
    found = find_sites(model).sites
    if not found:
        raise UsageError(f"{model.path}: no linear layer with a constant weight was found, so there is nothing to see")
    for site in found:
        if site.scope.startswith("function:") or site.activation.name not in visible:
            unseen[site.name] = _INSIDE
        else:
            sites.setdefault(site.activation.name, []).append(site)
    if not sites:
        raise UsageError(f"{model.path}: no layer can be seen: all are {_INSIDE}; inline the functions first")
    sums = {name: Accumulator(group[0].k, size) for name, group in sites.items()}
    return _Tally(sites, size, unseen, sums)


@dataclass
class _State:
    """The checkpoint; without a path nothing is kept. `fingerprint` is of everything that the result depends on."""

    path: Path | None
    fingerprint: str
    saved: float = field(default_factory=time.monotonic)

    def resume(self, tally: _Tally) -> int:
        """How many calls the checkpoint holds, after taking them over; 0 when it is not of this run."""
        if self.path is None or not self.path.exists():
            return 0
        about: dict[str, Any] = {}
        with suppress(InputError):  # a damaged checkpoint is none
            about, parts = read_archive(self.path)
        if about.get("fingerprint") != self.fingerprint:
            return 0
        tally.sums = dict(zip(tally.sums, parts, strict=True))
        tally.unseen |= about["unseen"]
        return about["done"]

    def keep(self, tally: _Tally, done: int) -> None:
        if self.path is not None and time.monotonic() - self.saved >= SAVE_EVERY:
            about = {"fingerprint": self.fingerprint, "done": done, "unseen": tally.unseen}
            write_archive(self.path, about, list(tally.sums.values()))
            self.saved = time.monotonic()

    def forget(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)

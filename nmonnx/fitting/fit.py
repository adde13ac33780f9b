"""`fit`: find the constants that make up for the pruning, on a text, with the original model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nmonnx.calibration.calls import Call, Calls, calls_of
from nmonnx.calibration.taps import Tapped
from nmonnx.convert import refuse_converted, refuse_foreign, selected
from nmonnx.errors import InputError, RunError, UsageError
from nmonnx.feeds import Feed
from nmonnx.fitting.closed_form import VARIANCE, fit_layer, judge
from nmonnx.fitting.groups import Activation, activations, in_groups
from nmonnx.fitting.learned import Learning, fit_learned
from nmonnx.fitting.moments import KEPT, Moments, Rows
from nmonnx.fitting.parts import Parts
from nmonnx.onnx_file.graph import load
from nmonnx.onnx_file.identity import model_sha256
from nmonnx.pruning.mitigations import CLOSED_FORM, LEARNED
from nmonnx.pruning.recipe import Recipe
from nmonnx.pruning.treatment import Plan, plan, prunes_of
from nmonnx.records.corrections import Correction, Corrections
from nmonnx.sites import Site, find_sites

MEMORY = 1 << 30
"""Bytes of sums that are held at a time: layers are fitted in groups, with one run over the text for each."""


@dataclass(frozen=True)
class Fit:
    """How to fit.

    window, max_tokens   how the text is read, see `calibrate`
    ridge      pull of least squares towards the original weight, in units of the mean diagonal of the Gram matrix
    hold_out   share of the windows, the last ones, that corrections are judged on and not fitted to
    memory     bytes of sums, about
    """

    window: int = 1024
    max_tokens: int | None = None
    ridge: float = 1.0
    hold_out: float = 0.2
    memory: int = MEMORY
    threads: int = 0

    def __post_init__(self) -> None:
        if self.window < 2 or (self.max_tokens is not None and self.max_tokens < 2):
            raise UsageError(f"window {self.window} and max_tokens {self.max_tokens} must be at least 2")
        if not (self.ridge > 0 and np.isfinite(self.ridge)):
            raise UsageError(f"ridge {self.ridge} must be above 0: without it rare channels go astray")
        if not 0 < self.hold_out < 1:
            raise UsageError(f"hold-out {self.hold_out} must be between 0 and 1")


def fit(
    model_path: str | Path,
    recipe: Recipe,
    out: str | Path,
    tokens: np.ndarray | None = None,
    feeds: Sequence[Feed | Mapping[str, np.ndarray]] | None = None,
    how: Fit | None = None,
    progress: Callable[[int, int], None] | None = None,
    label: str = "",
    learning: Learning | None = None,
    **measured: object,
) -> Corrections:
    """Write to `out` the corrections for the mitigations of `recipe`, found on `tokens` [T] or on `feeds`.

    1. Everything is fitted to what the original model gives its layers (dense inputs), each token with the inverse of
       its squared norm as weight, without the first token of each window.
    2. A correction is kept only if it lowers the error of its layer's output on held-out windows, and does not move
       the first token of windows; the others are in `Corrections.refused`, with the figures.
    3. Memory is that of the sums of one group of layers, see `Fit.memory`. A run that was cut short goes on with the
       group where it was, from the folder OUT.partial, which goes away at the end.
    4. Learned mitigations are handed to `nmonnx.learn`, with `learning` instead of `how` but for `max_tokens` and
       `threads`.

    `measured` are `stats`, `sensitivity` and `gradients`, as `plan` takes them. `progress` is told
    (done, all). Raises UsageError, InputError and RunError as `calibrate` does.
    """
    how, path, out = how or Fit(), Path(model_path), Path(out)
    if (tokens is None) == (feeds is None):
        raise UsageError("fitting needs a text or feeds, one of them")
    if not recipe.fitted:
        raise UsageError(f"the recipe has no mitigation to fit; give one of {', '.join((*CLOSED_FORM, *LEARNED))}")
    model = load(path)
    refuse_converted(model, "fit on")
    found = find_sites(model)
    chosen = selected(found, recipe).chosen
    source = model_sha256(path)
    refuse_foreign(path, measured)  # type: ignore[arg-type]
    planned = plan(recipe, found, chosen, **measured)  # type: ignore[arg-type]
    if set(recipe.fitted) & set(LEARNED):
        if tokens is None:
            raise UsageError(f"mitigation {recipe.fitted[0]} is learned on a text; give --text")
        read, learning = tokens[: how.max_tokens], learning or Learning()
        return fit_learned(path, recipe, planned, read, out, learning, how.threads, label, progress)
    taps, unseen = activations(model, chosen, planned)
    tapped = Tapped(path, model.proto, model.tensors, (a.name for a in taps), how.threads)
    text = None if tokens is None else np.asarray(tokens)[: how.max_tokens]
    calls = calls_of(tapped, text, feeds, how.window, sum(a.k for a in taps))
    if calls.count < 2:
        raise UsageError(
            "one window (or feed) is too few: some are held out to judge on; give more text or a smaller --window"
        )
    kept = hashlib.sha256(
        json.dumps([source, model.data_stamps(), calls.digest, recipe.to_json(), how.ridge, how.hold_out]).encode()
    )
    work = _Work(
        recipe, how, planned, calls, path, Parts(out, kept.hexdigest(), source, recipe, prunes_of(planned)), progress
    )
    work.run(in_groups(taps, how.memory, recipe.fitted))
    held = f"the last {work.held} of {calls.count} held out"
    words = f"{', '.join(recipe.fitted)}, ridge {how.ridge:g}; {calls.protocol}; {held}"
    return work.parts.join(out, f"{label}: {words}" if label else words, unseen)


@dataclass
class _Work:
    """The fit of all groups of activations. `held` of the steps, the last ones, are held out."""

    recipe: Recipe
    how: Fit
    plan: Plan
    calls: Calls
    path: Path
    parts: Parts
    progress: Callable[[int, int], None] | None
    held: int = field(init=False)

    def __post_init__(self) -> None:
        self.held = min(max(1, round(self.how.hold_out * self.calls.count)), self.calls.count - 1)

    def run(self, groups: Sequence[Sequence[Activation]]) -> None:
        """One run over the text for each group that is not done yet."""
        for number, group in enumerate(groups):
            if self.parts.has(number):
                continue
            sums = _Sums(group, self.plan, self.held * self.calls.each, self.recipe.fitted)
            for step in range(self.calls.count):
                held = step >= self.calls.count - self.held
                for call in self.calls.run(step, [a.name for a in group]):
                    sums.see(call, held, self.path)
                if self.progress:
                    each, all_steps = self.calls.each, self.calls.count * len(groups)
                    self.progress((number * self.calls.count + step + 1) * each, all_steps * each)
            self.parts.keep(number, self._solved(group, sums))

    def _solved(self, group: Sequence[Activation], sums: _Sums) -> Iterator[tuple[str, Correction | None, str]]:
        for activation in group:
            held, sinks = sums.held[activation.name].all(), sums.sinks[activation.name].all()
            for site in activation.sites:
                yield (site.name, *self._fitted(site, sums.moments[site.name], held, sinks))

    def _fitted(
        self, site: Site, moments: Moments, held: np.ndarray, sinks: np.ndarray
    ) -> tuple[Correction | None, str]:
        """The correction, or why there is none."""
        if not moments.weight or not len(held):
            return None, "no token reached it"
        try:
            weight = site.weight()
        except InputError as e:
            return None, str(e)
        if weight.shape != (site.k, site.n):
            return None, f"its weight has shape {list(weight.shape)}"
        treatment = self.plan.treatments[site.name]
        made = fit_layer(self.recipe.fitted, weight, moments, treatment, self.how.ridge, self.recipe.rank)
        said = judge(weight, made, treatment, held, sinks)
        return (None, said.refusal) if said.refusal else (made, "")


class _Sums:
    """What is held of one group of activations."""

    def __init__(self, group: Sequence[Activation], planned: Plan, held_tokens: int, names: Sequence[str]) -> None:
        self.group, self.plan = group, planned
        every = max(1, held_tokens // KEPT)
        self.held = {a.name: Rows(a.k, KEPT, every) for a in group}
        self.sinks = {a.name: Rows(a.k, KEPT // 10) for a in group}
        shared: dict[tuple[str, int], Moments] = {}
        self.moments: dict[str, Moments] = {}
        for a in group:
            for site in a.sites:
                key = (a.name, id(planned.treatments[site.name]))
                self.moments[site.name] = shared.setdefault(
                    key, Moments(a.k, a.matrices(names), bool(set(VARIANCE) & set(names)))
                )

    def see(self, call: Call, held: bool, path: Path) -> None:
        for a in self.group:
            x = call.values[a.name]
            if x.ndim == 0 or x.shape[-1] != a.k:
                continue
            rows, _, sink = call.rows(x.reshape(-1, a.k), 0)
            rows = rows.astype(np.float32)
            if not np.isfinite(rows).all():
                raise RunError(f"{path}: tensor {a.name!r} has values that are not finite {call.where}")
            if sink is not None and sink.any():
                self.sinks[a.name].add(rows[sink])
                rows = rows[~sink]
            if held:
                self.held[a.name].add(rows)
                continue
            done: set[int] = set()
            for site in a.sites:
                moments = self.moments[site.name]
                if id(moments) not in done:
                    moments.add(rows, self.plan.treatments[site.name])
                    done.add(id(moments))

"""`Treatment`: how one prune chooses its channels; worked out for every layer from the recipe and what was measured."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nmonnx.errors import InputError, Unseen, UsageError
from nmonnx.pattern import Pattern, Share
from nmonnx.pruning.allocate import Choice, allocate
from nmonnx.pruning.criteria import Layer, channel_scale, normalised
from nmonnx.pruning.emulated import DYNAMIC, threshold_of
from nmonnx.pruning.expected import fisher, forward
from nmonnx.pruning.grouping import Lost, deal, lost, swap
from nmonnx.pruning.recipe import Recipe
from nmonnx.pruning.shifts import CENTERS, SHIFTS
from nmonnx.reference import Center, prune, scores
from nmonnx.sites import Found, Site, matching

if TYPE_CHECKING:
    from nmonnx.records.gradients import Gradients
    from nmonnx.records.sensitivity import Sensitivity
    from nmonnx.records.stats import Seen, Stats

_LEAST_SHARE = 4
"""An allocation keeps at least one channel of so many, or half of what the pattern keeps."""


@dataclass(frozen=True, eq=False)
class Treatment:
    """The constants of one prune, as in the op contract: `scale` [K] and `shift` [K] or [1], float32, and `order` [K],
    int64; None where neutral. `variance`: the op restores the variance of each token (VAR), `center`: it moves each
    token by a number of its own (D-PTS). `threshold` [1], float32: what the kept ones score above, of the ops that have
    one."""

    pattern: Pattern
    scale: np.ndarray | None = None
    shift: np.ndarray | None = None
    order: np.ndarray | None = None
    variance: bool = False
    center: Center | None = None
    threshold: np.ndarray | None = None

    def digest(self) -> str:
        """A short hash of all of it."""
        about = [str(self.pattern), self.variance, self.center, sorted(self.constants())]
        arrays = b"".join(np.ascontiguousarray(values).tobytes() for _, values in sorted(self.constants().items()))
        return hashlib.sha256(json.dumps(about).encode() + arrays).hexdigest()[:16]

    def constants(self) -> dict[str, np.ndarray]:
        """The op's inputs, by name."""
        given = {"scale": self.scale, "shift": self.shift, "order": self.order, "threshold": self.threshold}
        return {name: values for name, values in given.items() if values is not None}


@dataclass(frozen=True)
class Plan:
    """treatments  by site name; sites that share a prune share one object
    plain       sites for which the constants could not be worked out, with the reason: the activation alone decides
    lost        what the order of each site with one spares
    """

    treatments: Mapping[str, Treatment]
    plain: Mapping[str, str]
    lost: Mapping[str, Lost] = field(default_factory=dict)


def prunes_of(plan: Plan) -> dict[str, str]:
    """The digest of each site's treatment."""
    digests = {id(t): t.digest() for t in plan.treatments.values()}
    return {name: digests[id(t)] for name, t in plan.treatments.items()}


def plan(
    recipe: Recipe,
    found: Found,
    sites: Sequence[Site],
    stats: Stats | None = None,
    sensitivity: Sensitivity | None = None,
    gradients: Gradients | None = None,
    keep: float | None = None,
) -> Plan:
    """The treatment of every chosen site. An allocation reads `keep` of the weights, by default N / M of the pattern.

    Raises UsageError when the recipe needs something that was not given, or an allocation a site that was not seen.
    """
    given = {"stats": stats, "sensitivity": sensitivity, "gradients": gradients}
    for need in recipe.needs:
        if given[need] is None:
            command = "calibrate" if need == "stats" else need
            raise UsageError(f"the recipe needs --{need}; make the file with 'nmonnx {command}' on the original model")
    patterns = _patterns(recipe, found)
    custom = _Vectors(Path(recipe.criterion)) if recipe.criterion.endswith(".npz") else None
    plain: dict[str, str] = {}
    made: list[tuple[list[Site], Treatment]] = []
    for group in share(sites, recipe.share, patterns):
        pattern, center = patterns.get(group[0].name, recipe.pattern), _center(recipe)
        treatment = Treatment(pattern, variance="var" in recipe.mitigations, center=center)
        try:
            seen = stats.of(group[0].name) if stats is not None and "stats" in recipe.needs else None
            slopes = gradients if recipe.criterion == "grad" else None
            layers = (Layer.of(site, seen, slopes.of(site.name) if slopes else None) for site in group)
            scale = custom.of(group) if custom else _scale(recipe.criterion, layers)
        except (InputError, Unseen) as e:
            reason = f"no statistics, {e.reason}" if isinstance(e, Unseen) else str(e)
            if recipe.scope == "threshold":
                raise UsageError(f"layer {group[0].name!r} gets no threshold: {reason}; leave it out") from e
            plain.update({site.name: reason for site in group})
        else:
            treatment = _calibrated(recipe, replace(treatment, scale=scale), seen)
        _refuse_nothing_kept(recipe, group[0], treatment.pattern)
        made.append((group, treatment))
    if recipe.allocate == "forward":
        assert stats is not None and sensitivity is not None
        losses = [forward(group, treatment, stats.of(group[0].name), sensitivity) for group, treatment in made]
        made = _allocated(recipe, made, losses, keep)
    if recipe.allocate == "fisher":
        assert gradients is not None
        made = _allocated(recipe, made, [fisher(group, treatment, gradients) for group, treatment in made], keep)
    spared: dict[str, Lost] = {}
    for number, (group, treatment) in enumerate(made):
        if stats is not None and treatment.order is not None:
            treatment, loss = _ordered(recipe.order, treatment, stats.of(group[0].name))
            made[number] = (group, treatment)
            spared |= dict.fromkeys((site.name for site in group), loss)
    return Plan({site.name: treatment for group, treatment in made for site in group}, plain, spared)


def share(sites: Sequence[Site], how: str, patterns: Mapping[str, Pattern]) -> list[list[Site]]:
    """The sites of each prune: "joint": those that read one activation in one graph with one pattern; "separate": each
    on its own, but for those behind one quantiser or call, which cannot be told apart."""
    groups: dict[tuple, list[Site]] = {}
    for site in sites:
        consumer, index = site.splice[0]
        inseparable = (id(consumer), index)
        together = (id(site.splice_graph), id(site.activation))
        key = (*(together if how == "joint" else inseparable), patterns.get(site.name))
        groups.setdefault(key, []).append(site)
    return list(groups.values())


def _scale(criterion: str, layers: Iterable[Layer]) -> np.ndarray | None:
    return None if criterion in DYNAMIC else channel_scale(criterion, layers)


def _refuse_nothing_kept(recipe: Recipe, site: Site, pattern: Pattern) -> None:
    if isinstance(pattern, Share) and recipe.scope == "token" and site.k * pattern.n < pattern.m:
        raise UsageError(f"{pattern} of the {site.k} channels of layer {site.name!r} is none; keep a larger share")


def _calibrated(recipe: Recipe, treatment: Treatment, seen: Seen | None) -> Treatment:
    """With the shift, the order and the threshold that the recipe asks for."""
    shift = next((m for m in recipe.mitigations if m in SHIFTS), None)
    if seen is not None and shift:
        treatment = replace(treatment, shift=SHIFTS[shift](seen))
    if seen is not None and recipe.order != "none":
        strength = seen.rms * (1 if treatment.scale is None else treatment.scale)
        treatment = replace(treatment, order=deal(strength, treatment.pattern.m))
    if seen is not None and recipe.scope == "threshold":
        if not seen.sample.size:
            raise UsageError("the statistics hold no sample of the activations; calibrate on a longer text")
        moved = prune(seen.sample.astype(np.float32), 1, 1, shift=treatment.shift, center=_center(recipe))
        bound = threshold_of(moved, treatment.scale, treatment.pattern.n, treatment.pattern.m)
        treatment = replace(treatment, threshold=bound)
    return treatment


def _ordered(how: str, treatment: Treatment, seen: Seen) -> tuple[Treatment, Lost]:
    """With the channels exchanged between the groups of its order if asked for, now that its n is known; and what the
    order spares."""
    n, m, order = treatment.pattern.n, treatment.pattern.m, treatment.order
    assert order is not None
    score = scores(seen.sample.astype(np.float32), treatment.scale, treatment.shift, treatment.center)
    if how == "swap":
        order = swap(order, score, n, m)
    return replace(treatment, order=order), lost(score, n, m, order)


def _center(recipe: Recipe) -> Center | None:
    return next((CENTERS[m] for m in recipe.mitigations if m in CENTERS), None)


def _patterns(recipe: Recipe, found: Found) -> dict[str, Pattern]:
    chosen: dict[str, Pattern] = {}
    for selector, pattern in recipe.patterns:
        chosen |= dict.fromkeys(matching(found, selector, "patterns:"), pattern)
    return chosen


def _allocated(
    recipe: Recipe, made: list[tuple[list[Site], Treatment]], losses: Sequence[np.ndarray], keep: float | None
) -> list[tuple[list[Site], Treatment]]:
    """With an n of its own for each prune, such that `keep` of the weights is read."""
    of_all = recipe.pattern
    choices = [Choice(sum(s.k * s.n for s in group), loss) for (group, _), loss in zip(made, losses, strict=True)]
    share = of_all.n / of_all.m if keep is None else keep
    least = min(of_all.m // _LEAST_SHARE, of_all.n // 2)
    kept = allocate(choices, share, max(1, least))
    return [
        (group, replace(treatment, pattern=Pattern(n, of_all.m)))
        for (group, treatment), n in zip(made, kept, strict=True)
    ]


class _Vectors:
    """Criterion vectors of one's own: an .npz with an array [K] for each site name."""

    def __init__(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as file:
                self._vectors = {name: file[name] for name in file.files}
        except FileNotFoundError as e:
            raise InputError(f"criterion {path} does not exist; give an .npz file, or a criterion by its name") from e
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as e:
            raise InputError(f"criterion {path} is no .npz file of vectors, one for each layer by name") from e
        self._path = path

    def of(self, group: Sequence[Site]) -> np.ndarray | None:
        parts = []
        for site in group:
            vector = self._vectors.get(site.name)
            if vector is None or vector.shape != (site.k,) or vector.dtype.kind not in "fiu" or not (vector >= 0).all():
                raise UsageError(
                    f"criterion {self._path}: it must hold {site.name!r}, {site.k} numbers from 0 up, one for each"
                    " input channel"
                )
            parts.append(np.square(vector.astype(np.float64)))
        return normalised(np.sqrt(sum(parts)))

"""The cheapest recipe within a budget of accuracy: allocations of a kept N to each layer, measured one by one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from nmonnx.convert import selected
from nmonnx.errors import UsageError
from nmonnx.onnx_file.graph import load
from nmonnx.parallel import Pool
from nmonnx.pruning.recipe import Recipe
from nmonnx.pruning.treatment import plan
from nmonnx.records.sensitivity import Sensitivity
from nmonnx.records.stats import Stats
from nmonnx.sites import find_sites
from nmonnx.sweeps.sweep import Job, Measured, run_jobs

_STYLES = 3
_STEPS = 7
_LEAST = 0.25


@dataclass(frozen=True)
class Answer:
    """label   the cheapest recipe within the budget, "" when there is none
    budget  nats for each token above the dense model
    yaml    the recipe as a file for `nmonnx convert -c`, "" when there is none
    steps   everything that was measured on the way, by label
    kept    share of the weights of all linear layers that it reads
    """

    label: str
    budget: float
    yaml: str
    steps: dict[str, Measured]
    kept: float

    def words(self, place: Path) -> str:
        if not self.label:
            return f"No recipe that was measured loses at most {self.budget:.4f} nats."
        return (
            f"Cheapest within {self.budget:.4f} nats above dense: {self.label}, which reads {100 * self.kept:.1f} % of"
            f" the weights; {place}."
        )


def search(
    dense: Job,
    found: Mapping[Job, Measured],
    recipes: Mapping[str, Recipe],
    budget: float,
    is_perplexity: bool,
    pool: Pool,
    progress: Callable[[int, int], None] | None = None,
) -> Answer:
    """Bisection over the share of weights that is read, from 1/4 to all of it, for the three styles (a recipe but for
    its N and its allocation) that lose least in the grid for what they save. Each step allocates a kept N to each layer
    (`allocate`) by the sensitivity file, and measures that recipe: the answer is within the budget on the
    text, by measurement. It is the cheapest of the steps and the grid. A step that fails counts as beyond the budget.

    found    results of the grid, the dense model's among them
    recipes  those of the grid, by their labels
    budget   nats for each token above the dense model; with `is_perplexity` the perplexity
    progress called with (jobs done, all) of each step

    Raises UsageError when the budget is below the dense model's loss, or what `plan` raises.
    """
    base = found[dense]
    nats = math.log(budget) - base.nll if is_perplexity else budget
    if nats < 0:
        raise UsageError(f"--budget-ppl {budget:g} is below the dense model's perplexity, {base.ppl:.2f}")
    space = _Space(dense)
    labels = {label: replace(dense, recipe=recipe) for label, recipe in recipes.items()}
    measured = {label: found[job] for label, job in labels.items() if job in found}
    spans = {style: (_LEAST, 1.0) for style in _styles(base, measured, recipes)}
    steps: dict[str, Measured] = {}
    chosen = dict(recipes)
    for _ in range(_STEPS):
        tried = {}
        for style, (low, high) in spans.items():
            keep = (low + high) / 2
            tried[style] = (keep, replace(dense, recipe=space.at(style, keep)))
        results, _failed = run_jobs([job for _, job in tried.values()], pool, progress)
        for style, (keep, job) in tried.items():
            low, high = spans[style]
            within = job in results and results[job].nll - base.nll <= nats
            spans[style] = (low, keep) if within else (keep, high)
            if job in results and job.recipe:
                label = f"{_words(style)} at {100 * keep:.1f} %"
                steps[label], chosen[label] = results[job], job.recipe
    fits = {label: m for label, m in {**measured, **steps}.items() if m.nll - base.nll <= nats}
    if not fits:
        return Answer("", nats, "", steps, 1.0)
    best = min(fits, key=lambda label: (fits[label].kept, fits[label].nll, label))
    content = yaml.safe_dump(json.loads(chosen[best].to_json()), sort_keys=False, allow_unicode=True)
    return Answer(best, nats, content, steps, fits[best].kept)


class _Space:
    """Allocations of a style at any share of the weights, as recipes that state each layer's pattern."""

    def __init__(self, dense: Job) -> None:
        given = dense.protocol
        assert given.stats is not None and given.sensitivity is not None
        self._found = find_sites(load(given.model))
        self._stats, self._sensitivity = Stats.load(given.stats), Sensitivity.load(given.sensitivity)

    def at(self, style: Recipe, keep: float) -> Recipe:
        sites = selected(self._found, style).chosen
        wanted = replace(style, allocate="forward")
        treatments = plan(wanted, self._found, sites, self._stats, self._sensitivity, keep=keep).treatments
        patterns = tuple((f"re:^{re.escape(name)}$", treatment.pattern) for name, treatment in treatments.items())
        return replace(style, patterns=patterns)


def _styles(base: Measured, measured: Mapping[str, Measured], recipes: Mapping[str, Recipe]) -> list[Recipe]:
    """The best few, each with the pattern M of its groups, by loss for each share saved."""
    score: dict[Recipe, float] = {}
    for label, m in measured.items():
        recipe = recipes[label]
        if recipe.patterns:
            continue
        style = replace(recipe, allocate="uniform", pattern=replace(recipe.pattern, n=recipe.pattern.m))
        cost = (m.nll - base.nll) / max(1 - m.kept, 1e-9)
        score[style] = min(score.get(style, math.inf), cost)
    return sorted(score, key=lambda style: (score[style], style.to_json()))[:_STYLES]


def _words(style: Recipe) -> str:
    choices = (style.criterion, style.share, style.order, *style.mitigations)
    return " ".join([f"N:{style.pattern.m}", *(c for c in choices if c not in ("joint", "none"))])

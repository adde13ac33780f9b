"""Whether corrections belong to a recipe, and what they change of its plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nmonnx.errors import InputError, UsageError
from nmonnx.pruning.recipe import Recipe
from nmonnx.pruning.treatment import Plan, Treatment, share
from nmonnx.records.corrections import Corrections
from nmonnx.sites import Site

MATTERS = ("pattern", "patterns", "criterion", "share", "order", "allocate", "mitigations", "rank")
"""What corrections are fitted for: another choice prunes other channels."""


def recipe_of(fit: Corrections) -> dict[str, Any]:
    """The recipe that the corrections were fitted for, as `Recipe.from_dict` takes it. Raises InputError."""
    try:
        data = json.loads(fit.recipe)
        Recipe.from_dict(data)
        return data
    except (ValueError, TypeError, UsageError) as e:
        raise InputError(f"the recipe in the corrections cannot be read ({e}); fit again") from e


def check_fit(recipe: Recipe, fit: Corrections | None) -> None:
    """Raises UsageError when the recipe needs corrections that are not given, or others than these."""
    if fit is None:
        if recipe.fitted:
            raise UsageError(
                f"mitigation {recipe.fitted[0]} needs --fit; make the file with 'nmonnx fit' on the original model"
            )
        return
    own = Recipe.from_dict(recipe_of(fit))
    for key in MATTERS:
        wanted, given = getattr(recipe, key), getattr(own, key)
        if wanted != given:
            raise UsageError(
                f"the corrections were fitted for {key} {_said(given)}, the recipe asks for {_said(wanted)}; fit again"
            )


def check_prunes(plan: Plan, fit: Corrections) -> None:
    """Raises UsageError when a layer would be pruned otherwise than it was fitted for, as by other statistics."""
    for name, treatment in plan.treatments.items():
        if name in fit.prunes and fit.prunes[name] != treatment.digest():
            raise UsageError(
                f"the corrections were fitted for another order, kept N, scale or shift of layer {name!r}; give the"
                " --stats, --sensitivity and --gradients that 'nmonnx fit' had, or fit again"
            )


def with_shifts(plan: Plan, fit: Corrections, sites: Sequence[Site]) -> Plan:
    """The plan with the shifts that were fitted; layers of one prune with different shifts get one prune each. Where
    they cannot, as `share` says, they keep the shift of the plan."""
    shared = [group for group in share(sites, "separate", {}) if len({_shift(fit, site) for site in group}) > 1]
    kept = {site.name for group in shared for site in group}
    made: dict[tuple[int, bytes], Treatment] = {}
    treatments = dict(plan.treatments)
    for name, treatment in plan.treatments.items():
        shift = fit.sites[name].shift if name in fit.sites and name not in kept else None
        if shift is not None:
            key = (id(treatment), np.ascontiguousarray(shift).tobytes())
            treatments[name] = made.setdefault(key, replace(treatment, shift=shift))
    return replace(plan, treatments=treatments)


def _shift(fit: Corrections, site: Site) -> bytes:
    shift = fit.sites[site.name].shift if site.name in fit.sites else None
    return b"" if shift is None else np.ascontiguousarray(shift).tobytes()


def _said(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(": ".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in value) or "none"
    return str(value)

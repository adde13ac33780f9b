"""Learn the corrections of a recipe on a text, with PyTorch, into one file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from nmonnx.pruning.recipe import Recipe
from nmonnx.pruning.treatment import Plan, prunes_of
from nmonnx.records.corrections import Corrections

_DISTIL = {"regime": "end-to-end", "rate": 2e-4, "windows": 120, "half": True}
"""Defaults of whole weights, which learn from the predictions of the dense model (benchmarks/README.md)."""


@dataclass(frozen=True)
class Learning:
    """What is asked of `nmonnx.learn.Settings`, each under its name there; None leaves its default, or that of
    `_DISTIL`."""

    regime: str | None = None
    epochs: int | None = None
    rate: float | None = None
    window: int | None = None
    windows: int | None = None
    held_out: float | None = None


def fit_learned(
    path: Path,
    recipe: Recipe,
    plan: Plan,
    tokens: np.ndarray,
    out: Path,
    how: Learning,
    threads: int = 0,
    label: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Corrections:
    """Write to `out` what `nmonnx.learn.learn` finds for the model at `path` on `tokens` [T]; `label` names the text.

    A run that was cut short goes on from the file OUT.checkpoint, which goes away at the end. Raises UsageError without
    PyTorch, and as `learn` does.
    """
    from nmonnx.learn import Settings, learn

    if threads:
        import torch

        torch.set_num_threads(threads)
    asked: dict[str, Any] = dict(_DISTIL) if "distil" in recipe.mitigations else {}
    asked |= {f.name: getattr(how, f.name) for f in fields(how) if getattr(how, f.name) is not None}
    settings, checkpoint = Settings(**asked, rank=recipe.rank), out.with_name(f"{out.stem}.checkpoint")
    found = learn(path, recipe, plan, tokens, settings, checkpoint=checkpoint, progress=progress)
    protocol = f"{label}: {found.protocol}" if label else found.protocol
    replace(found, protocol=protocol, prunes=prunes_of(plan)).save(out)
    checkpoint.unlink(missing_ok=True)
    return Corrections.load(out)

"""What a prune is expected to cost for every n that it may keep: what an allocation weighs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nmonnx.errors import UsageError
from nmonnx.pruning.criteria import Layer
from nmonnx.reference import keep_mask
from nmonnx.sites import Site

if TYPE_CHECKING:
    from nmonnx.pruning.treatment import Treatment
    from nmonnx.records.gradients import Gradients
    from nmonnx.records.sensitivity import Sensitivity
    from nmonnx.records.stats import Seen


def forward(group: Sequence[Site], treatment: Treatment, seen: Seen, sensitivity: Sensitivity) -> np.ndarray:
    """[m]: nats per token for n = 1..m: the output energy lost on the calibration sample, in the measure that the
    loss was measured to have at one n. Raises UsageError for a layer whose sensitivity was not measured."""
    curve = _lost_energy(group, treatment, seen)
    measured = sensitivity.pattern
    place = measured.n * len(curve) // measured.m - 1
    known = curve[min(max(place, 0), len(curve) - 1)]
    loss = sum(_loss(sensitivity, site.name) for site in group)
    return curve * (loss / known if known > 0 else 0.0)


def fisher(group: Sequence[Site], treatment: Treatment, gradients: Gradients) -> np.ndarray:
    """[m]: the Fisher estimate of the loss for n = 1..m: half the mean over tokens of (g . r)^2, with r the part of x
    that pruning removes and g the gradient of the log-loss by x, summed over the layers of the group.

    Raises Unseen for a layer that was not measured."""
    of_all = [gradients.of(site.name) for site in group]
    x = of_all[0].x.astype(np.float32)
    contribution = x * sum(one.slope.astype(np.float32) * one.unit for one in of_all)
    return np.array([float(np.square((contribution * ~mask).sum(axis=1)).mean() / 2) for mask in _masks(treatment, x)])


def _masks(treatment: Treatment, x: np.ndarray) -> list[np.ndarray]:
    """What is kept of x [R, K], for n = 1..m."""
    m = treatment.pattern.m
    criterion = (treatment.scale, treatment.shift, treatment.order, treatment.center)
    return [keep_mask(x, n, m, *criterion) for n in range(1, m + 1)]


def _lost_energy(group: Sequence[Site], treatment: Treatment, seen: Seen) -> np.ndarray:
    """[m]: the share of the output energy that keeping n = 1..m loses on the calibration sample, by the diagonal of
    W W^T: sum over dropped channels of (x_j ||W_j||)^2, over the same of all, mean over tokens."""
    norms = np.sqrt(sum(np.square(Layer.of(site).norms) for site in group))
    x = seen.sample.astype(np.float32)
    energy = np.square(x * norms)
    total = np.maximum(energy.sum(axis=1), np.finfo(np.float32).tiny)
    return np.array([float(((energy * ~mask).sum(axis=1) / total).mean()) for mask in _masks(treatment, x)])


def _loss(sensitivity: Sensitivity, name: str) -> float:
    """A layer's share of what pruning the layers on its activation costs, in nats per token."""
    if name not in sensitivity.sites:
        raise UsageError(f"the sensitivity of layer {name!r} was not measured; measure all layers")
    measured = sensitivity.sites[name]
    return max(measured.kl, 0.0) / len(measured.group)

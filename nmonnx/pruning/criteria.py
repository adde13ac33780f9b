"""Criteria: what makes a channel worth keeping. Each is a per-channel factor c[K] of the score |x - shift| * c.

Names and formulas follow Alanova et al., arXiv 2509.22166, and the papers named. To add one, write a function of a
`Layer` and list it in `CRITERIA`, and in `CALIBRATED` if it reads what calibration saw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from nmonnx.records.gradients import SiteGradient
    from nmonnx.records.stats import Seen
    from nmonnx.sites import Site

_OUTLIERS = (0.005, 0.995)
_SEED = 0


@dataclass(frozen=True)
class Layer:
    """weight  [K, N] float32, dequantised
    seen    what calibration saw of its input; None without calibration
    gradient  how the loss depends on its input; None where it was not measured
    """

    weight: np.ndarray
    seen: Seen | None = None
    gradient: SiteGradient | None = None

    @classmethod
    def of(cls, site: Site, seen: Seen | None = None, gradient: SiteGradient | None = None) -> Layer:
        """Raises InputError when the weight cannot be read."""
        weight = site.weight()
        if weight.ndim == 3:  # experts [E, K, N] stand side by side
            weight = weight.transpose(1, 0, 2).reshape(site.k, -1)
        return cls(weight, seen, gradient)

    @cached_property
    def norms(self) -> np.ndarray:
        """||W_j||2 of each input channel j [K], float64."""
        return np.sqrt(np.einsum("kn,kn->k", self.weight, self.weight, dtype=np.float64))


def column_norm(layer: Layer) -> np.ndarray:
    """||W_j||2, the length of the weights that channel j meets (WINA, arXiv 2505.19427). The scale of R-Sparse
    (arXiv 2504.19449), ||(V S)_j||2 of the SVD of W, is the same number."""
    return layer.norms


def root_column_norm(layer: Layer) -> np.ndarray:
    """sqrt(||W_j||2): half way between the activation alone and `column_norm`."""
    return np.sqrt(layer.norms)


def amber(layer: Layer) -> np.ndarray:
    """Amber-Pruner as the paper writes it: weights outside the quantiles 0.005 and 0.995 are dropped, the rest is
    standardised, and c_j is the norm of what is left in channel j (arXiv 2508.02128; section 3 of 2509.22166)."""
    inside, mean, deviation = _without_outliers(layer.weight)
    return np.linalg.norm(np.where(inside, (layer.weight - mean) / deviation, 0.0), axis=1)


def amber_code(layer: Layer) -> np.ndarray:
    """Amber-Pruner as its authors' code computes it: mean and deviation without the outliers, but all weights, the
    outliers too, are standardised and enter the norm. Exact quantiles where the code takes those of a sample."""
    _, mean, deviation = _without_outliers(layer.weight)
    return np.linalg.norm((layer.weight - mean) / deviation, axis=1)


def weight_variance(layer: Layer) -> np.ndarray:
    """Unbiased variance over the outputs of the weights that channel j meets; 0 for a layer of one output."""
    wide = layer.weight.astype(np.float64)
    return wide.var(axis=1, ddof=1) if wide.shape[1] > 1 else np.zeros(len(wide))


def static_clact(layer: Layer) -> np.ndarray:
    """CLACT (Eq. 4) made causal: the rms of channel j over the calibration tokens instead of its norm over the tokens
    of the call. The norm of the token is the same for all channels and decides nothing inside a group."""
    return _seen(layer).rms.astype(np.float64)


def smooth(layer: Layer) -> np.ndarray:
    """PCS: 1 / s_j with s_j = sqrt(max |X_j| / max |W_j|) over calibration tokens and outputs. Dividing the activation
    by s and multiplying the weight by it changes nothing but the score, so only the score is changed."""
    largest_x = _seen(layer).abs_max.astype(np.float64)
    largest_w = np.abs(layer.weight).max(axis=1).astype(np.float64)
    s = np.sqrt(largest_x / np.where(largest_w > 0, largest_w, 1))
    return np.where((largest_w > 0) & (s > 0), 1 / np.where(s > 0, s, 1), 0)


def mean_gradient(layer: Layer) -> np.ndarray:
    """E|g_j|, the mean magnitude of the gradient of the loss by channel j: |x_j| c_j is then the first-order estimate
    of what dropping it costs, made static. The paper's code multiplies by the gradient of each position instead."""
    assert layer.gradient is not None, "recipes that need gradients are refused without them"
    return np.abs(layer.gradient.slope.astype(np.float64)).mean(axis=0) * layer.gradient.unit


def uniform_random(layer: Layer) -> np.ndarray:
    """A baseline for sanity: factors far enough apart (10^0 to 10^6) that the activation hardly decides. Always the
    same for a given K."""
    return 10 ** (6 * np.random.default_rng(_SEED).random(len(layer.weight)))


Weighing = Callable[[Layer], np.ndarray]

CRITERIA: dict[str, Weighing | None] = {
    "act": None,
    "wina": column_norm,
    "sqrt-wina": root_column_norm,
    "amber": amber,
    "amber-code": amber_code,
    "var-weight": weight_variance,
    "clact-static": static_clact,
    "pcs": smooth,
    "grad": mean_gradient,
    "random": uniform_random,
}
"""By name, as in --criterion; None: the activation alone (ACT)."""

CALIBRATED = ("clact-static", "pcs")
"""Criteria that need `Layer.seen`."""


def channel_scale(criterion: str, layers: Iterable[Layer]) -> np.ndarray | None:
    """c[K] float32 for the layers that share one prune; None when the activation alone decides: then no weight is read
    where `layers` makes its items as it is gone through.

    Over several layers sqrt(sum of c squared), which for norms is the norm of the weights side by side; what does
    not depend on the weight stays what it is up to a factor. Only ratios matter, so the largest is made 1. When all
    are 0 or one is not finite, nothing can be told from them, and the activation alone decides.
    """
    weigh = CRITERIA[criterion]
    if weigh is None:
        return None
    joint = np.sqrt(sum(np.square(weigh(layer)) for layer in layers))
    return normalised(joint)


def normalised(c: np.ndarray) -> np.ndarray | None:
    """`c` as float32 with largest value 1; None when it is not finite or not positive anywhere."""
    largest = float(c.max(initial=0))
    if not np.isfinite(c).all() or largest <= 0:
        return None
    return (c / largest).astype(np.float32)


def _seen(layer: Layer) -> Seen:
    assert layer.seen is not None, "recipes that need calibration are refused without it"
    return layer.seen


def _without_outliers(weight: np.ndarray) -> tuple[np.ndarray, float, float]:
    low, high = np.quantile(weight, _OUTLIERS)
    inside = (weight >= low) & (weight <= high)
    values = weight[inside].astype(np.float64)
    deviation = float(values.std(ddof=1)) if values.size > 1 else 0.0
    return inside, float(values.mean()) if values.size else 0.0, deviation or 1.0

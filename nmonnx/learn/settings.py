"""What is learned, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nmonnx.errors import UsageError
from nmonnx.learn.pruned import Pruned
from nmonnx.pruning.treatment import Treatment
from nmonnx.records.corrections import Correction

LEARNED = {
    "l-pts": "shift",
    "output-shift": "bias",
    "ls": "scale",
    "r-sparse-learned": "low",
    "distil": "weight",
}
"""Name in a recipe -> part of `Correction`."""

REGIMES = ("by-layers", "end-to-end")
LOW_STARTS = ("svd", "random")


@dataclass(frozen=True)
class Settings:
    """regime     "by-layers": block after block, mean squared error of its output against what the dense block makes of
               the same input; "end-to-end": KL of the predictions to those of the dense model
    window     tokens of a window, each from an empty cache
    windows    the most windows that are trained on; with `epochs`, how often
    rate       of AdamW, falling linearly after `warm_up`, a share of the steps
    accumulate windows of a step
    held_out   share of the text, at its end, that corrections are judged on
    rank       of r-sparse-learned, which starts from the singular vectors of W or at random
    through    let gradients reach dropped channels too
    half       multiply in bfloat16
    seed       of the order of the windows and of what starts at random

    The defaults are those of the code of Alanova et al., arXiv 2509.22166, by layers.
    """

    regime: str = "by-layers"
    window: int = 512
    windows: int = 256
    epochs: int = 1
    rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warm_up: float = 0.03
    clip: float = 1.0
    accumulate: int = 1
    held_out: float = 0.1
    held_windows: int = 16
    rank: int = 64
    low_start: str = "svd"
    through: bool = False
    half: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("regime", REGIMES), ("low_start", LOW_STARTS)):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        for name in ("windows", "epochs", "accumulate", "held_windows", "rank"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)} must be at least 1")
        if self.window < 2 or not 0 < self.held_out < 1 or self.rate <= 0:
            raise UsageError("window must be at least 2, held_out between 0 and 1, and rate above 0")


def learned_parts(names: Sequence[str]) -> frozenset[str]:
    """Parts of `Correction` to train. Raises UsageError when none is named."""
    parts = frozenset(LEARNED[name] for name in names if name in LEARNED)
    if not parts:
        raise UsageError(f"the recipe names no mitigation that is learned; those are {', '.join(LEARNED)}")
    return parts


def pruned(
    treatment: Treatment,
    weight: np.ndarray,
    parts: frozenset[str],
    settings: Settings,
    salt: int,
    start: Correction | None = None,
) -> Pruned:
    """A product at the start of training. Raises UsageError for a weight that is not a matrix."""
    if weight.ndim != 2:
        raise UsageError(f"a weight of shape {list(weight.shape)} cannot be learned; leave its layer out")
    start = start or Correction()
    if "low" in parts and start.low is None:
        start = replace(start, low=_low(weight, settings, salt))
    return Pruned(treatment, weight, parts, start, settings.through, settings.half)


def _low(weight: np.ndarray, settings: Settings, salt: int) -> tuple[np.ndarray, np.ndarray]:
    rank = min(settings.rank, *weight.shape)
    if settings.low_start == "random":
        rng = np.random.default_rng([settings.seed, salt])
        a, b = (rng.normal(0, 0.02, size) for size in ((weight.shape[0], rank), (rank, weight.shape[1])))
        return a.astype(np.float32), b.astype(np.float32)
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    root = np.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * v[:rank]

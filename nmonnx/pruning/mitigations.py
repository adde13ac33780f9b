"""Names of the corrections that a recipe may ask for, and which of them go together."""

from __future__ import annotations

from collections.abc import Sequence

from nmonnx.errors import UsageError
from nmonnx.pruning.shifts import CENTERS, SHIFTS

CLOSED_FORM = ("bias", "output-scale", "least-squares", "static-var", "r-sparse", "bias1", "bias2")
LEARNED = ("l-pts", "output-shift", "ls", "r-sparse-learned", "distil")
FITTED = (*CLOSED_FORM, *LEARNED)
"""Those whose constants `nmonnx fit` finds."""

LOW_RANK = ("r-sparse", "r-sparse-learned")

_ONE_OF = {
    "shift": (*SHIFTS, *CENTERS, "l-pts"),
    "weight": ("least-squares", "bias1", "bias2", "distil"),
    "scale of the outputs": ("output-scale", "static-var", "ls"),
    "bias": ("bias", "output-shift"),
    "low rank": LOW_RANK,
    "variance": ("var", "static-var"),
}


def check_together(names: Sequence[str]) -> None:
    """Raise UsageError for mitigations that exclude each other."""
    fixed, own = (next((n for n in names if n in kind), None) for kind in (SHIFTS, CENTERS))
    if fixed and own:
        raise UsageError(
            f"mitigations {own} and {fixed} exclude each other: a token is moved by a number of its own or by"
            " calibrated ones; give one of them"
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UsageError(f"mitigation {twice} is given twice; give it once")
    for what, choices in _ONE_OF.items():
        given = [name for name in names if name in choices]
        if len(given) > 1:
            raise UsageError(f"mitigations {' and '.join(given)} are two choices of one {what}; give one of them")
    centers, fitted = ([n for n in names if n in kind] for kind in (CENTERS, FITTED))
    if centers and fitted:
        raise UsageError(
            f"mitigation {fitted[0]} is fitted for pruning without a center, {centers[0]}; give one of them"
        )
    closed, learned = ([n for n in names if n in kind] for kind in (CLOSED_FORM, LEARNED))
    if closed and learned:
        raise UsageError(f"mitigations {closed[0]} and {learned[0]}: one is computed, the other learned; give one kind")
    if set(LOW_RANK) & set(names) and {"least-squares", "bias1", "bias2"} & set(names):
        fits, splits = sorted(closed, key=lambda name: name in LOW_RANK)[:: len(closed) - 1]
        raise UsageError(f"mitigation {fits} fits the weight that {splits} splits; give one of them")

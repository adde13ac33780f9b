"""Whether weights that were stored in another form hold what they should: all of it, or as much as is claimed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from nmonnx.errors import InputError
from nmonnx.nbits import BITS, Quantised, relative_norm
from nmonnx.passes.bodies import FUSED
from nmonnx.sites import Site
from nmonnx.validate.claims import Claim
from nmonnx.validate.pair import Pair
from nmonnx.validate.result import Check, counted

_PARTS = ("W", "scales", "zeros")
_SAME_ERROR = 1e-3
"""Relative difference of two measurements of one error, of sums in another order."""


def check_stored_weights(pair: Pair, sites: Sequence[Site]) -> list[Check]:
    """1. Whole numbers that were only packed anew for `NMMatMulNBits` are worth what they were, bit for bit.
    2. A weight that was rounded is as far from that of the original as its record says. One that a correction changed
       before is measured with the correction instead, where that is given.
    """
    by_name = {site.name: site for site in sites}
    packed: list[list[str]] = []
    rounded: list[list[str]] = []
    for claim in pair.claims.pruned:
        own = own_weight(pair, claim) if claim.kernel in FUSED else None
        site = by_name.get(claim.name)
        if own is None or site is None or claim.name in pair.claims.fitted:
            continue
        if claim.weights:
            rounded.append([f"{claim.name!r}: {fault}" for fault in _faults(own, site, claim)])
        elif claim.kernel == "NMMatMulNBits":
            packed.append([f"{claim.name!r}: {fault}" for fault in _faults(own, site, claim)])
    named = (
        ("packed weights are worth what they were", "weights, bit for bit", packed),
        ("rounded weights are as close as recorded", "weights", rounded),
    )
    return [
        counted(name, len(each), [fault for faults in each for fault in faults], what)
        for name, what, each in named
        if each
    ]


def own_weight(pair: Pair, claim: Claim) -> Quantised | np.ndarray | None:
    """What the fused op of a layer reads: W as it is stored, or with its scales; None where it is no stored tensor."""
    trail = pair.new_trail(claim)
    ops = list(trail.own.items()) if trail is not None else []
    if len(ops) != 1:
        return None
    (scope, _), node = ops[0]
    found = {slot: pair.constant(key) for slot, key in pair.inputs_of(scope, node).items() if slot in _PARTS}
    if any(values is None for values in found.values()) or "W" not in found:
        return None
    if node.op_type == "NMMatMul":
        return found["W"]
    options = {a.name: a.i for a in node.attribute}
    scales = found.get("scales")
    if scales is None or found["W"] is None:
        return None
    return Quantised(options.get("bits", 0), options.get("block_size", 0), found["W"], scales, found.get("zeros"))


def _faults(own: Quantised | np.ndarray, site: Site, claim: Claim) -> Iterator[str]:
    try:
        made, want = values_of(own), site.weight()
    except (InputError, ValueError, KeyError, IndexError) as e:
        yield f"its weight cannot be read: {e}"
        return
    bits = own.bits if isinstance(own, Quantised) else 0
    if not claim.weights:
        if made.shape != want.shape or not np.array_equal(made, want, equal_nan=True):
            yield "its packed weight is not that of the original"
    elif bits != BITS.get(claim.weights, 0):
        yield f"is recorded as {claim.weights} but stored with {bits or 'floating-point'} bits"
    elif made.shape != want.shape:
        yield f"its weight has shape {list(made.shape)}, not {list(want.shape)}"
    else:
        error = relative_norm(made - want, want)
        recorded = claim.weight_error if claim.weight_error is not None else -1.0
        if abs(error - recorded) > _SAME_ERROR * recorded:
            yield f"its weight differs by {error:.4g}, not by {recorded:.4g} as recorded"


def values_of(weight: Quantised | np.ndarray) -> np.ndarray:
    """float32 [K, N]."""
    return weight.values() if isinstance(weight, Quantised) else weight.astype(np.float32)

"""Which channels share a group: a channel order along which the op cuts its groups, and what it could gain at most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nmonnx.reference import keep_mask

_AT_ONCE = 2048
"""Channels among which partners are looked for at once; bounds memory."""

_ROUNDS = 100
"""Rounds of swaps at most; they end earlier, when no swap is left that gains anything."""


def deal(strength: np.ndarray, group: int) -> np.ndarray:
    """An order [K], int64, that deals the channels over the groups like cards: the strongest first, one to each group,
    then back the other way (snake), so that strong channels do not compete with each other.

    strength  [K], for example the calibrated rms of each channel times its scale
    group     channels of a group; when it does not divide K the last group is shorter, and full earlier

    Ties go to the lowest channel; the channels of a group stand in ascending order.
    """
    channels = len(strength)
    sizes = [min(group, channels - start) for start in range(0, channels, group)]
    hands: list[list[int]] = [[] for _ in sizes]
    cards = iter(np.argsort(-strength, kind="stable").tolist())
    for turn in range(group):
        round_ = [hand for hand, size in zip(hands, sizes, strict=True) if turn < size]
        for hand, card in zip(round_ if turn % 2 == 0 else reversed(round_), cards, strict=False):
            hand.append(card)
    return np.array([channel for hand in hands for channel in sorted(hand)], np.int64)


def swap(order: np.ndarray, score: np.ndarray, keep: int, group: int) -> np.ndarray:
    """`order` [K] with channels exchanged between groups, so that channels that are wanted in the same tokens stand in
    different groups.

    score  [T, K], the scores of T tokens

    A channel is wanted in a token where its score is among the best K * keep / group of the token. Of every pair of
    groups so many exchanges are made, the most gainful first, as lower the sum over tokens and groups of (wanted
    channels in the group) squared. With as many wanted as kept in every group of every token, nothing is lost against
    `unstructured`.
    """
    wanted = unstructured(score, keep, group).astype(np.float32)
    size = max(_AT_ONCE // group, 2) * group
    parts = [_exchanged(order[start : start + size], wanted, group) for start in range(0, len(order), size)]
    return np.concatenate(parts) if parts else order


def unstructured(score: np.ndarray, keep: int, group: int) -> np.ndarray:
    """[T, K] booleans: the best K * keep / group channels of each token wherever they stand, which is the most that any
    order can come to."""
    channels = score.shape[1]
    count = channels // group * keep + min(keep, channels % group)
    mask = np.zeros(score.shape, bool)
    best = np.argpartition(-score, min(count, channels - 1), axis=1)[:, :count]
    np.put_along_axis(mask, best, True, axis=1)
    return mask


@dataclass(frozen=True)
class Lost:
    """The share of the squared scores that pruning drops on the calibration sample: with the groups as the channels
    `lie`, along the `order`, and with the best channels kept wherever they stand (`bound`), which no order beats."""

    lie: float
    order: float
    bound: float


def lost(score: np.ndarray, keep: int, group: int, order: np.ndarray) -> Lost:
    """What the order [K] spares of `score` [T, K]."""
    energy = np.square(score.astype(np.float64))
    masks = (
        keep_mask(score, keep, group),
        keep_mask(score, keep, group, order=order),
        unstructured(score, keep, group),
    )
    total = float(energy.sum()) or 1.0
    return Lost(*(float((energy * ~mask).sum() / total) for mask in masks))


def _exchanged(order: np.ndarray, wanted: np.ndarray, group: int) -> np.ndarray:
    """Some whole groups of the order after the exchanges among them."""
    channels = len(order)
    own = wanted[:, order]
    together = own.T @ own / max(len(own), 1)  # how often two channels are wanted in one token
    np.fill_diagonal(together, 0)
    of = np.arange(channels) // group
    members = np.eye(int(of.max(initial=0)) + 1, dtype=np.float32)
    for _ in range(_ROUNDS):
        pairs = _best_pairs(together, members[of], of)
        if not pairs:
            break
        for i, j in pairs:
            of[i], of[j] = of[j], of[i]
    groups = [np.sort(order[of == number]) for number in range(len(members))]
    return np.concatenate(groups)


def _best_pairs(together: np.ndarray, member: np.ndarray, of: np.ndarray) -> list[tuple[int, int]]:
    """Exchanges that gain something, at most one for each group."""
    with_group = together @ member  # [channel, group]
    cross = with_group[:, of]
    own = np.diagonal(cross)
    gain = own[:, None] + own[None, :] - cross - cross.T + 2 * together
    gain[of[:, None] == of[None, :]] = 0
    partner = gain.argmax(axis=1)
    gains = gain[np.arange(len(of)), partner]
    pairs: list[tuple[int, int]] = []
    busy: set[int] = set()
    for i in np.argsort(-gains, kind="stable").tolist():
        if gains[i] <= 1e-6:
            break
        j = int(partner[i])
        if not busy & {of[i], of[j]}:
            busy |= {of[i], of[j]}
            pairs.append((i, j))
    return pairs

"""Which channels share a group: a channel order along which the op cuts its groups."""

from __future__ import annotations

import numpy as np


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

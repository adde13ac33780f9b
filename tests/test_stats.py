"""Statistics equal numpy's on all rows at once, however the rows are cut into pieces and shards."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmonnx.accumulator import Accumulator
from nmonnx.errors import InputError, UsageError
from nmonnx.stats import Seen, Stats

ROWS = (np.random.default_rng(0).standard_normal((200, 6)) * 3).astype(np.float32)
SINK = np.arange(200) % 50 == 0


def whole(size: int = 20) -> Accumulator:
    sums = Accumulator(6, size)
    sums.add(ROWS, np.arange(200), SINK)
    return sums


def test_the_sums_are_those_of_numpy() -> None:
    seen, rest = Seen.of(whole()), ROWS[~SINK].astype(np.float64)
    assert seen.tokens == len(rest) == 196
    np.testing.assert_allclose(seen.mean, rest.mean(axis=0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(seen.rms, np.sqrt((rest**2).mean(axis=0)), rtol=1e-6)
    np.testing.assert_array_equal(seen.abs_max, np.abs(ROWS).max(axis=0))  # the sink tokens too
    lower_median = np.sort(rest, axis=1)[:, 2]
    assert seen.token_median == pytest.approx(lower_median.mean(), rel=1e-6)


def test_the_sample_is_of_the_rows_and_never_a_sink() -> None:
    sums = whole()
    assert len(sums.sample) == 20
    assert not SINK[sums.index].any()
    np.testing.assert_array_equal(sums.sample, ROWS[sums.index].astype(np.float16))


@given(st.lists(st.integers(0, 200), max_size=6), st.lists(st.integers(0, 3), min_size=8, max_size=8))
def test_pieces_and_shards_merge_to_the_same(cuts: list[int], shards: list[int]) -> None:
    parts = [Accumulator(6, 20) for _ in range(4)]
    edges = [0, *sorted(cuts), 200]
    for number, (a, b) in enumerate(itertools.pairwise(edges)):
        parts[shards[number % 8]].add(ROWS[a:b], np.arange(a, b), SINK[a:b])
    total = Accumulator(6, 20)
    for part in parts:
        total.merge(part)
    one = whole()
    np.testing.assert_array_equal(total.index, one.index)
    np.testing.assert_array_equal(total.sample, one.sample)
    np.testing.assert_array_equal(total.abs_max, one.abs_max)
    for name in ("total", "square", "median"):
        np.testing.assert_allclose(getattr(total, name), getattr(one, name), rtol=1e-12)


def test_a_file_holds_all_of_it_and_shared_activations_once(tmp_path: Path) -> None:
    seen = Seen.of(whole())
    stats = Stats({"q": seen, "k": seen}, "0" * 64, "by hand", {"v": "not there"})
    back = Stats.load(stats.save(tmp_path / "s.npz"))
    assert back.of("q") is back.of("k")
    assert (back.source, back.protocol, back.unseen) == (stats.source, stats.protocol, stats.unseen)
    for name in ("mean", "rms", "abs_max", "sample"):
        np.testing.assert_array_equal(getattr(back.of("q"), name), getattr(seen, name))
    with pytest.raises(UsageError, match="not there"):
        back.of("v")


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "cut", "other"])
def test_other_files_are_refused_in_one_sentence(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "s.npz"
    content = Stats({"q": Seen.of(whole())}, "0" * 64, "by hand").save(path).read_bytes()
    path.write_bytes({"empty": b"", "text": b"hello", "cut": content[: len(content) // 2]}.get(damage, content))
    if damage == "missing":
        path.unlink()
    if damage == "other":
        np.savez(path, a=np.zeros(3))
    with pytest.raises(InputError, match=r"s\.npz"):
        Stats.load(path)


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        Accumulator(2, 4).add(np.array([[1.0, np.nan]], np.float32))

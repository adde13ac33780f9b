"""Statistics of activations: against numpy, merged from shards, and from a file that may be damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nmonnx.errors import InputError, ModelError, UsageError
from nmonnx.records.accumulator import Accumulator
from nmonnx.records.archive import read_archive, write_archive
from nmonnx.records.stats import Seen, Stats


def rows(count: int = 700, k: int = 30, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((count, k)) * 3 + 1).astype(np.float32)


def filled(x: np.ndarray, size: int = 64, pieces: int = 1, first: int = 0) -> Accumulator:
    sums = Accumulator(x.shape[1], size)
    at = first
    for piece in np.array_split(x, pieces):
        sums.add(piece, np.arange(at, at + len(piece)))
        at += len(piece)
    return sums


def assert_same(a: Accumulator, b: Accumulator) -> None:
    assert (a.rows, a.tokens) == (b.rows, b.tokens)
    np.testing.assert_allclose(a.total, b.total, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(a.square, b.square, rtol=1e-12)
    assert a.median == pytest.approx(b.median, rel=1e-12)
    for name in ("abs_max", "index", "sample"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def stats(x: np.ndarray, source: str = "abc", protocol: str = "rows", first: int = 0) -> Stats:
    shared = Seen.of(filled(x, first=first))
    return Stats({"q": shared, "k": shared, "down": Seen.of(filled(-x, first=first))}, source, protocol, {"odd": "why"})


@pytest.mark.parametrize("k", [7, 8])
def test_everything_equals_numpy(k):
    x = rows(k=k)
    seen = Seen.of(filled(x))
    wide = x.astype(np.float64)
    np.testing.assert_array_equal(seen.mean, wide.mean(axis=0).astype(np.float32))
    np.testing.assert_array_equal(seen.rms, np.sqrt((wide**2).mean(axis=0)).astype(np.float32))
    np.testing.assert_array_equal(seen.abs_max, np.abs(x).max(axis=0))
    assert seen.token_median == pytest.approx(np.sort(wide, axis=1)[:, (k - 1) // 2].mean(), rel=1e-12)
    assert seen.tokens == len(x)
    assert [a.dtype for a in (seen.mean, seen.rms, seen.abs_max)] == [np.float32] * 3
    assert seen.sample.dtype == np.float16


def test_the_sample_is_rows_in_order_spread_over_all_of_them():
    x = rows()
    sums = filled(x, size=64)
    assert len(sums.index) == len(set(sums.index)) == 64
    assert (np.diff(sums.index) > 0).all()
    np.testing.assert_array_equal(sums.sample, x[sums.index].astype(np.float16))
    assert np.histogram(sums.index, bins=4, range=(0, len(x)))[0].min() >= 8


def test_few_rows_are_all_in_the_sample():
    x = rows(10)
    np.testing.assert_array_equal(filled(x, 64, 3).sample, x.astype(np.float16))


def test_values_beyond_float16_are_clipped_in_the_sample_alone():
    x = np.array([[1e6, -1e6, 1]], np.float32)
    seen = Seen.of(filled(x))
    assert seen.sample.tolist() == [[65504, -65504, 1]]
    assert seen.abs_max.tolist() == [1e6, 1e6, 1]


def test_a_sink_counts_in_the_largest_magnitude_alone():
    x = rows(100)
    x[::10] *= 1000
    sink = np.zeros(100, bool)
    sink[::10] = True
    sums = Accumulator(x.shape[1], 200)
    sums.add(x, sink=sink)
    seen, want = Seen.of(sums), Seen.of(filled(x[~sink], 200))
    np.testing.assert_array_equal(seen.rms, want.rms)
    np.testing.assert_array_equal(seen.sample, want.sample)
    assert (seen.tokens, seen.token_median) == (90, want.token_median)
    np.testing.assert_array_equal(seen.abs_max, np.abs(x).max(axis=0))


@pytest.mark.parametrize("pieces", [2, 7, 700])
def test_pieces_change_nothing(pieces):
    assert_same(filled(rows(), pieces=pieces), filled(rows()))


def test_shards_merge_to_the_same_in_any_order():
    x = rows()
    shards = [filled(x[a:b], first=a) for a, b in ((0, 20), (20, 500), (500, 700))]
    for order in ((0, 1, 2), (2, 0, 1)):
        total = Accumulator(x.shape[1], 64)
        for i in order:
            total.merge(shards[i])
        assert_same(total, filled(x))


def test_merged_statistics_are_those_of_all_of_it(tmp_path):
    x = rows()
    parts = [stats(x[:300]).save(tmp_path / "a.npz"), stats(x[300:], first=300).save(tmp_path / "b.npz")]
    merged, whole = Stats.merge([Stats.load(part) for part in parts]), stats(x)
    assert list(merged.seen) == list(whole.seen)
    assert merged.of("q") is merged.of("k")
    assert (merged.protocol, merged.unseen) == ("rows", {"odd": "why"})
    for site in whole.seen:
        assert_same(merged.of(site).accumulator(), whole.of(site).accumulator())


def test_a_file_gives_back_what_was_saved_and_an_activation_once(tmp_path):
    saved = stats(rows())
    loaded = Stats.load(saved.save(tmp_path / "s.npz"))
    assert (loaded.source, loaded.protocol, loaded.unseen) == ("abc", "rows", {"odd": "why"})
    assert loaded.of("q") is loaded.of("k") is not loaded.of("down")
    for site, seen in saved.seen.items():
        for name in ("tokens", "token_median", "mean", "rms", "abs_max", "sample"):
            np.testing.assert_array_equal(getattr(loaded.of(site), name), getattr(seen, name))
    with np.load(tmp_path / "s.npz", allow_pickle=False) as file:
        assert sum(name.endswith(".sample") for name in file.files) == 2
    loaded.save(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "s.npz").read_bytes()


def test_statistics_made_by_hand_are_saved_too(tmp_path):
    x = rows(50)
    own = Seen.of(filled(x))
    hand = Seen(own.tokens, own.mean, own.rms, own.abs_max, own.token_median, own.sample)
    loaded = Stats.load(Stats({"q": hand}, "abc", "hand").save(tmp_path / "s.npz")).of("q")
    for name in ("tokens", "mean", "rms", "abs_max", "sample"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(own, name))


def test_a_layer_that_was_not_seen_is_refused_with_the_reason():
    with pytest.raises(UsageError, match="'odd' has no activation statistics: why"):
        stats(rows()).of("odd")
    with pytest.raises(UsageError, match="another model"):
        stats(rows()).of("nothing")


def test_statistics_that_do_not_belong_together_do_not_merge():
    x = rows()
    with pytest.raises(UsageError, match="different models"):
        Stats.merge([stats(x), stats(x, source="other")])
    with pytest.raises(UsageError, match="different layers"):
        Stats.merge([stats(x), Stats({"q": stats(x).of("q")}, "abc", "rows")])
    with pytest.raises(UsageError, match="no statistics"):
        Stats.merge([])


def test_a_missing_damaged_or_other_file_is_one_sentence(tmp_path):
    good = stats(rows()).save(tmp_path / "good.npz").read_bytes()

    def refused(content: bytes | None) -> str:
        path = tmp_path / "s.npz"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError) as error:
            Stats.load(path)
        return str(error.value)

    assert "does not exist" in refused(None)
    for bad in (b"", b"text", good[: len(good) // 2], good[:-40], b"PK\x03\x04" + b"x" * 100):
        assert "damaged" in refused(bad)
    damaged = bytearray(good)
    damaged[good.index(filled(rows()).sample.tobytes()) + 100] ^= 255
    assert "damaged" in refused(bytes(damaged))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    assert "holds no activation statistics" in refused((tmp_path / "other.npz").read_bytes())
    np.save(tmp_path / "array.npy", np.zeros(3))
    assert "holds no activation statistics" in refused((tmp_path / "array.npy").read_bytes())
    with pytest.raises(InputError, match="cannot be read"):
        Stats.load(tmp_path)


def test_another_schema_version_is_refused(tmp_path, monkeypatch):
    path = stats(rows()).save(tmp_path / "s.npz")
    monkeypatch.setattr("nmonnx.records.archive.SCHEMA_VERSION", 2)
    with pytest.raises(InputError, match="schema version 1, this nmonnx reads 2"):
        Stats.load(path)


def test_a_checkpoint_is_no_finished_file(tmp_path):
    write_archive(tmp_path / "s.partial.npz", {"done": 3}, [filled(rows())])
    assert read_archive(tmp_path / "s.partial.npz")[0]["done"] == 3
    with pytest.raises(InputError, match="no finished activation statistics"):
        Stats.load(tmp_path / "s.partial.npz")


def test_a_folder_that_cannot_be_written_leaves_nothing(tmp_path: Path):
    with pytest.raises(ModelError, match="cannot write"):
        stats(rows()).save(tmp_path / "none" / "s.npz")
    assert not list(tmp_path.iterdir())


def test_values_that_are_not_finite_are_refused():
    for bad in (np.nan, np.inf, -np.inf):
        x = rows(5)
        x[3, 2] = bad
        with pytest.raises(ValueError, match="not finite"):
            filled(x)

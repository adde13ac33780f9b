"""Metrics against torch and closed forms, and on arrays that break naive ones."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nmonnx.evaluation import metrics
from nmonnx.evaluation.metrics import LogitTally, Tally, closeness, logit_closeness

RNG = np.random.default_rng(0)


def f32(*values):
    return np.array(values, np.float32)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_are_those_of_the_definitions_in_float64(dtype):
    a, b = RNG.standard_normal((2, 3, 5, 7)).astype(dtype)
    x, y = a.astype(np.float64), b.astype(np.float64)
    got = closeness(a, b)
    assert got.elements == 105 and got.unmatched == 0 and got.equal == 0
    assert got.max_abs == np.abs(x - y).max()
    assert got.mean_abs == pytest.approx(np.abs(x - y).mean(), rel=1e-12)
    assert got.relative == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-12)
    assert got.snr_db == pytest.approx(10 * np.log10((x**2).sum() / ((x - y) ** 2).sum()), rel=1e-12)
    assert got.cosine == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)


def test_equal_arrays_have_no_error_and_infinite_snr():
    a = RNG.standard_normal((4, 4)).astype(np.float16)
    got = closeness(a, a.copy())
    assert (got.equal, got.max_abs, got.relative, got.snr_db) == (1, 0, 0, math.inf)
    assert got.cosine == pytest.approx(1, abs=1e-15)


def test_a_difference_that_float16_cannot_square_is_still_measured():
    got = closeness(np.full(3, 60000, np.float16), np.full(3, -60000, np.float16))
    assert got.max_abs == 2 * float(np.float16(60000)) and got.cosine == pytest.approx(-1)


def test_nan_and_inf_in_the_same_places_are_equal_and_the_rest_is_measured():
    got = closeness(f32(np.nan, np.inf, -np.inf, 1), f32(np.nan, np.inf, -np.inf, 1.5))
    assert (got.unmatched, got.equal, got.max_abs, got.mean_abs) == (0, 0.75, 0.5, 0.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_or_inf_in_one_array_alone_is_counted_and_makes_the_largest_error_infinite(bad):
    got = closeness(f32(1, 2), f32(1, bad))
    assert (got.unmatched, got.max_abs, got.equal) == (1, math.inf, 0.5)
    assert closeness(f32(np.inf), f32(-np.inf)).unmatched == 1


def test_no_elements_count_as_equal():
    got = closeness(np.zeros((2, 0, 4), np.float32), np.zeros((2, 0, 4), np.float32))
    assert (got.elements, got.equal, got.max_abs, got.snr_db, got.cosine) == (0, 1, 0, math.inf, 1)
    empty = logit_closeness(np.zeros((1, 0, 9)), np.zeros((1, 0, 9)))
    assert (empty.positions, empty.kl, empty.top1) == (0, 0, 1)


def test_an_error_without_a_signal_is_infinite_and_orthogonal():
    got = closeness(np.zeros(2), np.ones(2))
    assert (got.relative, got.snr_db, got.cosine) == (math.inf, -math.inf, 0)
    assert closeness(np.zeros(2), np.zeros(2)).cosine == 1


def test_integers_booleans_and_strings_have_an_exact_share():
    assert closeness(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5])).equal == 0.75
    assert closeness(np.array([True, False]), np.array([True, True])).equal == 0.5
    assert closeness(np.array(["a", "b"], object), np.array(["a", "c"], object)).equal == 0.5
    big = np.array([2**62 + 1])
    assert closeness(big, big + 1).equal == 0  # equal once rounded to float64


def test_adding_pairs_one_by_one_in_any_piece_size_equals_one_pair_of_all(monkeypatch):
    a, b = RNG.standard_normal((2, 6, 11))
    whole, logits = closeness(a, b), logit_closeness(a, b)
    monkeypatch.setattr(metrics, "_CHUNK", 13)
    parts, logit_parts = Tally(), LogitTally()
    for row_a, row_b in zip(a, b, strict=True):
        parts.add(row_a, row_b)
        logit_parts.add(row_a[None], row_b[None])
    for got, want in ((parts.result(), whole), (logit_parts.result(), logits)):
        assert vars(got) == pytest.approx(vars(want), rel=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_kl_and_agreement_equal_torch(dtype):
    torch = pytest.importorskip("torch")
    a = (3 * RNG.standard_normal((2, 9, 50))).astype(dtype)
    b = (a + RNG.standard_normal(a.shape)).astype(dtype)
    ta, tb = (torch.tensor(x).double() for x in (a, b))
    want = torch.nn.functional.kl_div(tb.log_softmax(-1), ta.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    top = [t.topk(5).indices.reshape(-1, 5).tolist() for t in (ta, tb)]
    got = logit_closeness(a, b)
    assert got.positions == 18
    assert got.kl == pytest.approx(want.mean().item(), rel=1e-9)
    assert got.kl_max == pytest.approx(want.max().item(), rel=1e-9)
    assert got.top1 == pytest.approx((ta.argmax(-1) == tb.argmax(-1)).double().mean().item())
    assert 0 < got.top1 < 1
    assert got.top5 == pytest.approx(np.mean([len(set(x) & set(y)) / 5 for x, y in zip(*top, strict=True)]))


def test_masked_logits_do_not_count_and_a_token_masked_only_in_the_second_is_infinitely_far():
    a = np.array([[0.0, 1.0, -np.inf]])
    assert logit_closeness(a, a).kl == 0
    assert logit_closeness(a, np.array([[0.0, -np.inf, 1.0]])).kl == math.inf
    assert logit_closeness(a, np.array([[0.0, 1.0, -1.0]])).kl == pytest.approx(
        math.log(1 + math.e + math.exp(-1)) - math.log(1 + math.e)
    )


def test_a_row_with_nan_is_infinitely_far_and_does_not_agree():
    got = logit_closeness(np.array([[0.0, 1.0], [0.0, 1.0]]), np.array([[0.0, np.nan], [0.0, 1.0]]))
    assert (got.kl, got.top1) == (math.inf, 0.5)


def test_fewer_than_five_tokens_are_compared_as_they_are():
    assert logit_closeness(np.array([[1.0, 2.0]]), np.array([[2.0, 1.0]])).top5 == 1


def test_arrays_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[2\] and \[3\]"):
        closeness(np.zeros(2), np.zeros(3))

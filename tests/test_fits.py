"""Closed-form fits: each against least squares written out over all tokens, in float64."""

from __future__ import annotations

import numpy as np
import pytest

from nmonnx.fitting.closed_form import fit_layer, judge
from nmonnx.fitting.moments import Moments, Rows, pruned, token_weights
from nmonnx.pattern import Pattern
from nmonnx.pruning.treatment import Treatment
from nmonnx.reference import prune, variance_ratio

K, N, ROWS = 16, 6, 300
RNG = np.random.default_rng(0)
W = RNG.standard_normal((K, N)).astype(np.float32)
MIX = RNG.standard_normal((K, K)) * 0.4 + np.eye(K)
X = (RNG.standard_normal((ROWS, K)) @ MIX + RNG.standard_normal(K)).astype(np.float32)
SHIFT = RNG.standard_normal(K).astype(np.float32)
PLAIN = Treatment(Pattern(4, 8))
TREATMENTS = {
    "plain": PLAIN,
    "shift": Treatment(Pattern(4, 8), shift=SHIFT),
    "scalar shift": Treatment(Pattern(4, 8), shift=SHIFT[:1]),
    "scale, order, variance": Treatment(
        Pattern(2, 8), RNG.uniform(0.5, 2, K).astype(np.float32), None, RNG.permutation(K), True
    ),
}
TREATED = pytest.mark.parametrize("treatment", TREATMENTS.values(), ids=TREATMENTS)


def parts(treatment: Treatment) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """u, v and the weights of the tokens, by the reference."""
    p = treatment.pattern
    v = prune(X, p.n, p.m, treatment.scale, treatment.shift, treatment.order, treatment.variance)
    u = X if treatment.shift is None else X - treatment.shift
    weights = 1 / (X.astype(np.float64) ** 2).sum(axis=1)
    return u.astype(np.float64), v.astype(np.float64), weights


def fitted(names: tuple[str, ...], treatment: Treatment = PLAIN, ridge: float = 0.3, rank: int = 3):  # type: ignore[no-untyped-def]
    moments = Moments(K, True, variance=True)
    for rows in np.array_split(X, 7):
        moments.add(rows, treatment)
    return fit_layer(names, W, moments, treatment, ridge, rank)


def ridge_rows(v: np.ndarray, weights: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Square roots of the weights, of sum 1, and of the ridge."""
    share = weights / weights.sum()
    return np.sqrt(share)[:, None], np.sqrt(ridge * np.diag((v.T * share) @ v).mean()) * np.eye(K)


@TREATED
def test_the_fast_prune_is_the_reference(treatment):
    u, v, _ = parts(treatment)
    got = pruned(X, treatment)
    np.testing.assert_array_equal(got[0], u.astype(np.float32))
    np.testing.assert_allclose(got[1], v, rtol=1e-6)


@pytest.mark.parametrize("ridge", [0.01, 1.0])
@TREATED
def test_least_squares(treatment, ridge):
    u, v, weights = parts(treatment)
    root, pull = ridge_rows(v, weights, ridge)
    a, y = np.vstack([root * v, pull]), np.vstack([root * (u @ W), pull @ W])
    want = np.linalg.lstsq(a, y, rcond=None)[0]
    got = fitted(("least-squares",), treatment, ridge)
    np.testing.assert_allclose(got.weight, want, rtol=1e-3, atol=1e-3)
    if treatment.shift is not None:  # the bias is about to have shift W', where the layer has shift W
        np.testing.assert_allclose(got.bias, np.broadcast_to(treatment.shift, K) @ (W - want), rtol=1e-3, atol=1e-2)


def test_a_strong_ridge_pulls_towards_the_weight():
    np.testing.assert_allclose(fitted(("least-squares",), ridge=1e6).weight, W, atol=1e-4)


def test_least_squares_with_a_bias():
    u, v, weights = parts(PLAIN)
    share = weights / weights.sum()
    centred = v - share @ v
    root, _ = ridge_rows(v, weights, 1)
    pull = np.sqrt(0.3 * np.diag((centred.T * share) @ centred).mean()) * np.eye(K)
    a = np.vstack([np.hstack([root * v, root]), np.hstack([pull, np.zeros((K, 1))])])
    want = np.linalg.lstsq(a, np.vstack([root * (u @ W), pull @ W]), rcond=None)[0]
    got = fitted(("least-squares", "bias"))
    np.testing.assert_allclose(got.weight, want[:K], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(got.bias, want[K], rtol=1e-3, atol=1e-3)


@TREATED
def test_bias_is_the_mean_of_what_is_lost(treatment):
    u, v, weights = parts(treatment)
    want = weights @ ((u - v) @ W) / weights.sum()
    np.testing.assert_allclose(fitted(("bias",), treatment).bias, want, rtol=1e-3, atol=1e-4)


@TREATED
def test_output_scale_of_each_output(treatment):
    u, v, weights = parts(treatment)
    root = np.sqrt(weights)
    want = [np.linalg.lstsq((root * (v @ W[:, n]))[:, None], root * (u @ W[:, n]), rcond=None)[0][0] for n in range(N)]
    np.testing.assert_allclose(fitted(("output-scale",), treatment).scale, want, rtol=1e-4)


def test_static_variance_is_the_mean_ratio():
    u, v, weights = parts(PLAIN)
    want = weights @ variance_ratio(u, v)[:, 0] / weights.sum()
    np.testing.assert_allclose(fitted(("static-var",)).scale, np.full(N, want), rtol=1e-5)


def test_bias1_is_the_best_number_for_all_outputs():
    u, v, weights = parts(PLAIN)
    root, pull = ridge_rows(v, weights, 0.3)
    a = np.vstack([np.vstack([root * v] * N), np.sqrt(N) * pull])
    y = np.concatenate([(root * ((u - v) @ W)).T.reshape(-1), np.zeros(K)])
    want = np.linalg.lstsq(a, y, rcond=None)[0]
    np.testing.assert_allclose(fitted(("bias1",)).weight - W, np.tile(want[:, None], N), rtol=1e-3, atol=1e-3)


def test_bias2_is_the_best_number_for_all_outputs_of_what_is_lost():
    u, v, _ = parts(PLAIN)
    want = np.linalg.lstsq(np.vstack([u - v] * N), ((u - v) @ W).T.reshape(-1), rcond=None)[0]
    a, b = fitted(("bias2",)).low
    np.testing.assert_allclose(a[:, 0], want, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(b, np.ones((1, N)))


def test_r_sparse_is_the_closest_low_rank():
    torch = pytest.importorskip("torch")
    left, values, right = torch.linalg.svd(torch.tensor(W, dtype=torch.float64), full_matrices=False)
    a, b = fitted(("r-sparse",)).low
    assert (a.shape, b.shape) == ((K, 3), (3, N))
    want = (left[:, :3] * values[:3]) @ right[:3]
    np.testing.assert_allclose(a @ b, want.numpy(), atol=1e-5)


def test_the_judgement_is_the_weighted_error_of_the_outputs():
    u, v, weights = parts(PLAIN)
    made = fitted(("least-squares", "bias"))
    said = judge(W, made, PLAIN, X, X[:0])
    energy = weights @ ((u @ W) ** 2).sum(axis=1)
    assert said.before == pytest.approx(weights @ (((u - v) @ W) ** 2).sum(axis=1) / energy, rel=1e-4)
    error = v @ made.weight + made.bias - u @ W
    assert said.after == pytest.approx(weights @ (error**2).sum(axis=1) / energy, rel=1e-4)
    assert said.refusal == ""


def test_a_correction_that_does_not_help_is_refused_with_its_figures():
    made = fitted(("bias",))
    said = judge(W, made, PLAIN, -X, X[:0])
    assert f"{said.after:.4f}" in said.refusal and "held-out" in said.refusal


def test_a_correction_that_moves_the_first_token_is_refused():
    made = fitted(("bias",))
    said = judge(W, made, PLAIN, X, X[:3] * 1e-3)
    assert "first token" in said.refusal


def test_a_row_of_zeros_has_no_weight():
    np.testing.assert_array_equal(token_weights(np.zeros((2, K), np.float32)), 0)


def test_rows_are_spread_and_bounded():
    rows = Rows(1, most=4, every=3)
    for part in np.array_split(np.arange(20.0), 6):
        rows.add(part[:, None])
    np.testing.assert_array_equal(rows.all()[:, 0], [0, 3, 6, 9])

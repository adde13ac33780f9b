"""Every criterion against an implementation in torch written from the papers' equations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nmonnx.pruning.criteria import CRITERIA, Layer, channel_scale
from nmonnx.records.gradients import SiteGradient
from nmonnx.records.stats import Seen

torch = pytest.importorskip("torch", reason="the reference formulas are written in torch")

WEIGHTS = hnp.arrays(np.float32, st.tuples(st.integers(1, 24), st.integers(1, 12)), elements=st.floats(-4, 4, width=16))


def seen(x: np.ndarray) -> Seen:
    return Seen(
        tokens=len(x),
        mean=x.mean(axis=0),
        rms=np.sqrt(np.square(x).mean(axis=0)),
        abs_max=np.abs(x).max(axis=0),
        token_median=float(torch.tensor(x).median(dim=1).values.mean()),
        sample=x.astype(np.float16),
    )


def amber(w: torch.Tensor, drop: bool) -> torch.Tensor:
    """Amber-Pruner: (1) quantiles 0.005 and 0.995, (2) standardise, (3) norm of each input channel."""
    flat = w.double().flatten()
    low, high = torch.quantile(flat, 0.005), torch.quantile(flat, 0.995)
    inside = (w >= low) & (w <= high)
    values = w.double()[inside]
    deviation = values.std() if values.numel() > 1 else torch.tensor(0.0)
    mean = values.mean() if values.numel() else 0.0
    standard = (w.double() - mean) / (deviation if deviation > 0 else 1.0)
    return torch.where(inside, standard, 0.0).norm(dim=1) if drop else standard.norm(dim=1)


def reference(name: str, weight: np.ndarray, x: np.ndarray) -> torch.Tensor:
    w, a = torch.tensor(weight), torch.tensor(x)
    match name:
        case "wina":
            return w.double().norm(dim=1)
        case "sqrt-wina":
            return w.double().norm(dim=1).sqrt()
        case "amber":
            return amber(w, drop=True)
        case "amber-code":
            return amber(w, drop=False)
        case "var-weight":
            return w.double().var(dim=1) if w.shape[1] > 1 else torch.zeros(len(w))
        case "clact-static":
            return a.double().norm(dim=0)
        case "pcs":
            s = (a.abs().max(dim=0).values.double() / w.abs().max(dim=1).values.double()).sqrt()
            return 1 / s
    raise AssertionError(name)


@pytest.mark.parametrize("name", ["wina", "sqrt-wina", "amber", "amber-code", "var-weight"])
@given(weight=WEIGHTS)
def test_factors_of_the_weight_equal_the_equations(name: str, weight: np.ndarray) -> None:
    want = reference(name, weight, np.zeros((1, len(weight)), np.float32)).numpy()
    got = channel_scale(name, [Layer(weight)])
    if want.max() <= 1e-12:
        assert got is None or want.max() > 0
    else:
        np.testing.assert_allclose(got, want / want.max(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["clact-static", "pcs"])
def test_factors_of_the_activation_equal_the_equations(name: str) -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((32, 8)).astype(np.float32)
    x = (rng.standard_normal((64, 32)) * rng.uniform(0.1, 5, 32)).astype(np.float32)
    want = reference(name, weight, x).numpy()
    np.testing.assert_allclose(channel_scale(name, [Layer(weight, seen(x))]), want / want.max(), rtol=1e-5)


def test_joint_norms_are_the_norms_of_the_weights_side_by_side() -> None:
    rng = np.random.default_rng(2)
    parts = [rng.standard_normal((16, n)).astype(np.float32) for n in (3, 8)]
    joint = channel_scale("wina", [Layer(w) for w in parts])
    np.testing.assert_allclose(joint, channel_scale("wina", [Layer(np.concatenate(parts, axis=1))]), rtol=1e-6)


@pytest.mark.parametrize("name", sorted(CRITERIA))
@pytest.mark.parametrize("weight", [np.zeros((8, 4)), np.ones((8, 1)), np.ones((1, 4)), np.full((8, 4), np.nan)])
def test_degenerate_weights_give_finite_factors_or_none(name: str, weight: np.ndarray) -> None:
    rows = np.zeros((4, len(weight)), np.float32)
    layer = Layer(weight.astype(np.float32), seen(rows), SiteGradient.of(rows, rows))
    factors = channel_scale(name, [layer])
    assert factors is None or (np.isfinite(factors).all() and factors.max() == 1 and factors.min() >= 0)

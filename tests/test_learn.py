"""Learned corrections: the pruned product in torch against numpy, training on a tiny decoder, acceptance, resuming."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from small_models import weights
from tiny_decoder import VOCAB, write_decoder

from nmonnx.errors import UsageError
from nmonnx.onnx_file.graph import load
from nmonnx.pattern import Pattern
from nmonnx.pruning.recipe import Recipe
from nmonnx.pruning.treatment import Plan, Treatment, plan
from nmonnx.records.corrections import Correction
from nmonnx.reference import keep_mask as reference_mask
from nmonnx.reference import prune_matmul
from nmonnx.sites import find_sites

torch = pytest.importorskip("torch")
from nmonnx.learn import Settings, TorchGraph, learn  # noqa: E402
from nmonnx.learn.blocks import find_blocks  # noqa: E402
from nmonnx.learn.pruned import Pruned, keep_mask  # noqa: E402

torch.set_num_threads(1)  # small tensors

QUICK = Settings(window=16, windows=16, epochs=2, rate=5e-3, held_windows=4)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return write_decoder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(5).integers(0, VOCAB, 16 * 32)


def _plan(path, recipe=None) -> tuple[Recipe, Plan]:
    recipe = recipe or Recipe(pattern=Pattern(4, 16))
    found = find_sites(load(path))
    return recipe, plan(recipe, found, [s for s in found.sites if s.role != "lm_head"])


@hypothesis_settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 8),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_the_mask_is_that_of_the_reference(keep, channels, ordered, coarse, seed):
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((3, channels)).astype(np.float32)
    z = np.round(z) if coarse else z  # many ties
    scale = rng.random(channels).astype(np.float32)
    order = rng.permutation(channels) if ordered else None
    mine = keep_mask(torch.tensor(z), keep, 8, torch.tensor(scale), None if order is None else torch.tensor(order))
    np.testing.assert_array_equal(mine.numpy(), reference_mask(z, keep, 8, scale, None, order))


@pytest.mark.parametrize("variance", [False, True])
def test_the_product_is_the_formula_of_a_correction(variance):
    x, weight = weights(5, 32), weights(32, 6, seed=1)
    c = Correction(
        shift=weights(32, seed=2) / 4,
        weight=weights(32, 6, seed=3),
        scale=weights(6, seed=4),
        bias=weights(6, seed=5),
        low=(weights(32, 2, seed=6), weights(2, 6, seed=7)),
    )
    treatment = Treatment(Pattern(4, 8), np.abs(weights(32, seed=8)), None, None, variance)
    module = Pruned(treatment, weight, start=c)
    a, b = c.low
    inner = (c.weight - a @ b) * c.scale
    expected = prune_matmul(x, inner, 4, 8, c.bias, treatment.scale, c.shift, variance=variance)
    expected = expected + x @ a @ b + c.shift @ inner
    np.testing.assert_allclose(module(torch.tensor(x)).detach().numpy(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("through", [False, True])
def test_gradients_reach_what_is_kept_or_all(through):
    x = torch.tensor(weights(2, 16)).requires_grad_()
    Pruned(Treatment(Pattern(4, 16)), weights(16, 3, seed=1), through=through)(x).sum().backward()
    assert (x.grad != 0).sum().item() == (32 if through else 8)


def test_blocks_begin_at_the_residual_stream(decoder):
    model = load(decoder)
    found = find_sites(model)
    first, second = find_blocks(TorchGraph(model), found, [s for s in found.sites if s.block is not None], "logits")
    assert (first.inputs, first.targets) == ((), ("x1",))
    assert set(second.inputs) == {"x1", "n1"} or second.inputs == ("x1",)
    assert len(first.sites) == len(second.sites) == 3


FORMS = (
    *(["l-pts"], ["output-shift"], ["ls"], ["r-sparse-learned"], ["distil"]),
    *(["ls", "output-shift"], ["l-pts", "ls", "output-shift"]),
)


@pytest.mark.parametrize("regime", ["by-layers", "end-to-end"])
@pytest.mark.parametrize("form", FORMS, ids="+".join)
def test_what_is_learned_brings_unseen_predictions_closer_to_the_dense_ones(decoder, tokens, regime, form):
    recipe, treated = _plan(decoder)
    settings = replace(QUICK, regime=regime, rank=4)
    found = learn(decoder, recipe, treated, tokens, settings, learned=form)
    assert found.sites
    unseen = np.random.default_rng(6).integers(0, VOCAB, 64)
    assert _distance(decoder, treated, found.sites, unseen) < _distance(decoder, treated, {}, unseen)


def _distance(path, treated, corrections, row) -> float:
    model = load(path)
    graph, sites = TorchGraph(model), [s for s in find_sites(model).sites if s.name in treated.treatments]
    products = {
        s: Pruned(treated.treatments[s.name], s.weight(), start=corrections.get(s.name, Correction())) for s in sites
    }
    with torch.no_grad():
        dense, sparse = (graph.run({"input_ids": row[None]}, ["logits"], p)["logits"] for p in ({}, products))
    return float((torch.log_softmax(dense, -1) - torch.log_softmax(sparse, -1)).square().mean())


def test_what_does_not_help_is_refused_with_the_figures(decoder, tokens):
    recipe, treated = _plan(decoder, Recipe(pattern=Pattern(16, 16)))  # nothing is lost, so nothing can be gained
    found = learn(decoder, recipe, treated, tokens, QUICK, learned=["output-shift"])
    assert not found.sites and set(found.refused) == set(treated.treatments)
    assert "without it" in next(iter(found.refused.values()))


@pytest.mark.parametrize("regime", ["by-layers", "end-to-end"])
def test_a_run_that_was_cut_short_goes_on(decoder, tokens, tmp_path, regime):
    recipe, treated = _plan(decoder)
    settings = replace(QUICK, regime=regime, epochs=3)
    whole = learn(decoder, recipe, treated, tokens, settings, learned=["ls"])
    again = learn(decoder, recipe, treated, tokens, settings, learned=["ls"])

    def stop(done, total):
        if done == (1 if regime == "by-layers" else 40):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(decoder, recipe, treated, tokens, settings, ["ls"], checkpoint=tmp_path / "c", progress=stop)
    seen: list[int] = []
    rest = learn(
        *(decoder, recipe, treated, tokens, settings, ["ls"]),
        checkpoint=tmp_path / "c",
        progress=lambda done, total: seen.append(done),
    )
    for name, site in whole.sites.items():
        np.testing.assert_allclose(rest.sites[name].scale, site.scale, rtol=1e-5)
        np.testing.assert_allclose(again.sites[name].scale, site.scale, rtol=1e-5)
    assert regime == "by-layers" or seen[0] > 32


def test_a_recipe_without_anything_to_learn_and_a_bad_setting_are_told(decoder, tokens):
    recipe, treated = _plan(decoder)
    with pytest.raises(UsageError, match="no mitigation that is learned"):
        learn(decoder, recipe, treated, tokens, QUICK)
    with pytest.raises(UsageError, match="regime 'sideways'"):
        Settings(regime="sideways")


def test_without_torch_a_sentence_says_what_to_install():
    code = "import sys; sys.modules['torch'] = None\nimport nmonnx.cli\nimport nmonnx.learn"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UsageError: learning needs PyTorch; install it with: pip install 'nmonnx[learn]'" in done.stderr

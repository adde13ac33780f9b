"""Gradients at the inputs of layers against finite differences in ONNX Runtime, and the Fisher estimate from them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from tiny_decoder import HIDDEN, VOCAB, write_decoder

from nmonnx.convert import convert
from nmonnx.errors import InputError, UsageError
from nmonnx.onnx_file.graph import load
from nmonnx.pattern import Pattern
from nmonnx.pruning.expected import fisher
from nmonnx.pruning.recipe import Recipe
from nmonnx.pruning.treatment import Treatment
from nmonnx.records.gradients import Gradients, SiteGradient
from nmonnx.reference import prune
from nmonnx.sites import find_sites

DOWN = "/model/layers.0/mlp/down_proj/MatMul"
WINDOW = 8


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return write_decoder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(5).integers(0, VOCAB, 4 * WINDOW)


@pytest.fixture(scope="module")
def measured(decoder, tokens):
    pytest.importorskip("torch")
    from nmonnx.learn.gradients import measure_gradients

    return measure_gradients(decoder, tokens, window=WINDOW, windows=1, sample=WINDOW - 1)


def test_gradients_equal_finite_differences(decoder, tokens, measured):
    model = onnx.load(decoder)
    down = next(node for node in model.graph.node if node.name == DOWN)
    model.graph.node.insert(
        list(model.graph.node).index(down), helper.make_node("Add", [down.input[0], "moved"], ["there"])
    )
    model.graph.output.add(name=down.input[0])
    down = next(node for node in model.graph.node if node.name == DOWN)
    down.input[0] = "there"
    model.graph.input.append(helper.make_tensor_value_info("moved", TensorProto.FLOAT, [1, WINDOW, HIDDEN]))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    row = tokens[None, :WINDOW].astype(np.int64)

    def loss(moved: np.ndarray) -> float:
        logits = session.run(["logits"], {"input_ids": row, "moved": moved})[0][0, :-1].astype(np.float64)
        scores = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return -float(scores[np.arange(WINDOW - 1), row[0, 1:]].sum())

    found = measured.of(DOWN)
    seen = session.run(None, {"input_ids": row, "moved": np.zeros((1, WINDOW, HIDDEN), np.float32)})[-1]
    np.testing.assert_allclose(found.x, seen[0, 1:], rtol=2e-3, atol=1e-4)
    slope = found.slope.astype(np.float64) * found.unit
    for place, channel in ((1, 0), (3, 7), (5, 31)):
        step = np.zeros((1, WINDOW, HIDDEN), np.float32)
        step[0, place, channel] = 0.02
        expected = (loss(step) - loss(-step)) / 0.04
        assert slope[place - 1, channel] == pytest.approx(expected, rel=0.02, abs=2e-3)


def test_the_fisher_estimate_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    x, slopes = rng.normal(size=(9, 8)).astype(np.float32), rng.normal(size=(2, 9, 8)).astype(np.float32)
    sites = {name: SiteGradient.of(x, slope) for name, slope in zip("ab", slopes, strict=True)}
    order = rng.permutation(8)
    treatment = Treatment(Pattern(2, 4), order=order)
    group = [type("Site", (), {"name": name}) for name in "ab"]
    got = fisher(group, treatment, Gradients(sites, "", ""))
    assert got[-1] == 0
    for n in (1, 2, 3):
        removed = x - prune(x, n, 4, order=order)
        expected = 0.5 * np.mean(((slopes.sum(axis=0) * removed).sum(axis=1)) ** 2)
        assert got[n - 1] == pytest.approx(expected, rel=0.02)


def test_an_allocation_by_gradients_reads_as_much_and_keeps_more_where_it_matters(decoder, measured, tmp_path):
    names = [s.name for s in find_sites(load(decoder)).sites if s.role != "lm_head"]
    loud = replace(measured, sites={n: replace(g, unit=g.unit * (100 if n == DOWN else 1)) for n, g in _of(measured)})
    recipe = Recipe(pattern=Pattern(8, 16), allocate="fisher", criterion="grad", share="separate")
    done = convert(decoder, tmp_path / "sparse.onnx", recipe, gradients=loud)
    kept = {r["name"]: Pattern.parse(r["pattern"]) for r in done.records if r["status"] == "pruned"}
    assert sorted(kept) == sorted(names)
    assert kept[DOWN].n == max(p.n for p in kept.values()) > 8
    assert sum(p.n for p in kept.values()) <= 8 * len(kept)


def _of(measured: Gradients):
    return measured.sites.items()


def test_gradients_are_saved_and_asked_for(decoder, measured, tmp_path):
    loaded = Gradients.load(measured.save(tmp_path / "g.npz"))
    assert loaded.source == measured.source and list(loaded.sites) == list(measured.sites)
    np.testing.assert_array_equal(loaded.of(DOWN).slope, measured.of(DOWN).slope)
    with pytest.raises(UsageError, match="nmonnx gradients"):
        convert(decoder, None, Recipe(allocate="fisher"))
    with pytest.raises(UsageError, match="measure again"):
        convert(decoder, None, Recipe(criterion="grad"), gradients=replace(measured, source="0" * 64))
    (tmp_path / "other.npz").write_bytes(json.dumps({}).encode())
    with pytest.raises(InputError, match="nmonnx gradients"):
        Gradients.load(tmp_path / "other.npz")

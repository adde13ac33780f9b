"""Shares, thresholds, dynamic CLACT and the smallest kept: against numpy from the formulas, and in whole models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from small_models import mlp, weights, write
from test_treatment import branches, stats_of

from nmonnx.convert import convert
from nmonnx.errors import UsageError
from nmonnx.library import make_session
from nmonnx.passes.emulated_bodies import emulated_function
from nmonnx.pattern import Pattern, Share
from nmonnx.pruning.emulated import OPS, select, threshold_of
from nmonnx.pruning.presets import PRESETS
from nmonnx.pruning.recipe import Recipe
from nmonnx.reference import center_of
from nmonnx.validate import validate

RECIPES = {
    "share": {"pattern": "50%"},
    "share wina": {"pattern": "30%", "criterion": "wina"},
    "call": {"pattern": "50%", "scope": "call"},
    "teal": PRESETS["teal"],
    "chess": PRESETS["chess"],
    "clact": {"pattern": "4:8", "criterion": "clact"},
    "clact share": {"pattern": "50%", "criterion": "clact"},
    "clact call": {"pattern": "50%", "criterion": "clact", "scope": "call"},
    "share var": {"pattern": "50%", "mitigations": ["var"]},
    "share s-pts var": {"pattern": "50%", "mitigations": ["s-pts", "var"]},
    "call d-pts": {"pattern": "50%", "scope": "call", "mitigations": ["d-pts"]},
    "teal s-pts": {**PRESETS["teal"], "mitigations": ["s-pts-scalar"]},
    "clact d-pts var": {"pattern": "4:8", "criterion": "clact", "mitigations": ["d-pts-mean", "var"]},
    "clact s-pts": {"pattern": "4:8", "criterion": "clact", "mitigations": ["s-pts-median"]},
    "anti": {"pattern": "5:16", "criterion": "anti"},
    "anti call": {"pattern": "12.5%", "criterion": "anti", "scope": "call"},
}


def run(op: str, opset: int, keep: int, group: int, **arrays: np.ndarray) -> np.ndarray:
    """The function in ONNX Runtime, without the library."""
    node = helper.make_node(op, list(arrays), ["y"], domain="ai.nmonnx", keep=keep, group=group)
    elem = {name: helper.np_dtype_to_tensor_dtype(a.dtype) for name, a in arrays.items()}
    inputs = [helper.make_tensor_value_info(name, elem[name], [None] * a.ndim) for name, a in arrays.items()]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", elem["x"], None)])
    model = helper.make_model(
        graph,
        functions=[onnx.parser.parse_function(emulated_function(op, opset, "shift" in arrays))],
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("ai.nmonnx", 1)],
        ir_version=8,
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, arrays)[0]


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_the_function_and_the_reference_agree_on_ties_nan_and_any_size(op: str, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([np.float32, np.float16, np.float64]))
    tokens, channels = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 40))
    group = data.draw(st.integers(1, 16))
    keep = data.draw(st.integers(1, group))
    opset = data.draw(st.sampled_from([15, 17, 20]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    nasty = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 1, 1, -1, 2, -3], dtype)
    shifted, is_nasty = data.draw(st.booleans()), data.draw(st.booleans())
    is_nasty |= shifted and dtype is np.float64  # whose differences the function rounds to float32
    x = rng.choice(nasty, (2, tokens, channels)) if is_nasty else weights(2, tokens, channels)
    given_ = {
        "x": x.astype(dtype),
        "scale": rng.choice(np.array([0, 0.5, 1], np.float32), channels),
        "threshold": np.array([0.6], np.float32),
    }
    arrays = {name: given_[name] for name in OPS[op].inputs}
    arrays |= {"shift": rng.integers(-2, 3, channels).astype(np.float32)} if shifted else {}
    want = select(op, arrays["x"], keep, group, arrays.get("scale"), arrays.get("threshold"), arrays.get("shift"))
    got = run(op, opset, keep, group, **arrays)
    assert got.dtype == want.dtype and got.shape == want.shape
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(want))


def test_the_number_kept_is_the_share_of_a_token_or_of_the_call() -> None:
    x = weights(7, 30)
    each = select("NMTopK", x, 35, 100)
    assert (np.count_nonzero(each, axis=1) == 10).all()
    assert all(np.abs(row[kept == 0]).max() <= np.abs(kept[kept != 0]).min() for row, kept in zip(x, each, strict=True))
    whole = select("NMTopKCall", x, 35, 100)
    assert np.count_nonzero(whole) == 73
    assert np.abs(x[whole == 0]).max() <= np.abs(whole[whole != 0]).min()


def test_clact_is_equation_4_and_at_one_token_magnitude() -> None:
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(weights(2, 5, 32)).double()
    flat = x.reshape(-1, 32)
    score = flat.abs() / flat.norm(dim=1, keepdim=True) * flat.norm(dim=0, keepdim=True)
    bound = score.flatten().topk(160).values[-1]
    got = select("NMClactTopKCall", x.numpy(), 50, 100)
    np.testing.assert_array_equal(got, torch.where(score >= bound, flat, 0.0).reshape(x.shape).numpy())
    best = score.reshape(-1, 8).topk(3, dim=1).indices
    groups = torch.zeros(40, 8, dtype=torch.bool).scatter(1, best, True).reshape(x.shape)
    np.testing.assert_array_equal(select("NMClact", x.numpy(), 3, 8), torch.where(groups, x, 0.0).numpy())
    one = np.array([[1e-30, -3e-30, 2e-30, 0, 1, 2]], np.float32)
    np.testing.assert_array_equal(select("NMClact", one, 1, 3), [[0, one[0, 1], 0, 0, 0, 2]])


def test_anti_keeps_what_magnitude_drops() -> None:
    x = weights(4, 32)
    kept = select("NMAnti", x, 3, 8) != 0
    largest = np.argsort(-np.abs(x.reshape(-1, 8)), axis=1)[:, :5]
    want = np.ones((16, 8), bool)
    np.put_along_axis(want, largest, False, axis=1)
    np.testing.assert_array_equal(kept, want.reshape(4, 32))


def test_a_threshold_keeps_its_share_of_the_sample_and_with_the_norms_is_one_for_each_channel() -> None:
    sample, c = weights(64, 20), np.linspace(0.1, 1, 20, dtype=np.float32)
    for keep in (1, 25, 50, 99):
        bound = threshold_of(sample, c, keep, 100)
        kept = select("NMThreshold", sample, keep, 100, c, bound)
        assert np.count_nonzero(kept) == 64 * 20 * keep // 100
        by_channel = np.abs(sample) > bound / c
        assert (by_channel == (kept != 0)).mean() > 0.999  # the division rounds


@pytest.mark.parametrize("name", RECIPES)
def test_a_converted_model_computes_what_the_reference_does_and_validates(tmp_path: Path, name: str) -> None:
    source = write(mlp(), tmp_path / "model.onnx")
    recipe = Recipe.from_dict(dict(RECIPES[name]))
    done = convert(source, tmp_path / "sparse.onnx", recipe, stats=stats_of(source) if recipe.needs else None)
    up, down = (onnx.numpy_helper.to_array(t) for t in onnx.load(source).graph.initializer)
    x = weights(1, 6, 32, seed=7)
    y = x
    for site, weight in zip(done.selection.chosen, (up, down), strict=True):
        treatment = done.plan.treatments[site.name]
        n, m = treatment.pattern.n, treatment.pattern.m
        y = np.maximum(y, 0) if weight is down else y
        shift, center = treatment.shift, treatment.center
        taken = np.zeros(1) if shift is None else shift
        taken = taken + center_of(y, center, shift) if center else taken
        given_ = (treatment.scale, treatment.threshold, shift, treatment.variance, center)
        y = (select(recipe.emulated, y, n, m, *given_) + taken) @ weight
    for library in (True, False):
        got = make_session(tmp_path / "sparse.onnx", library=library).run(None, {"x": x})[0]
        np.testing.assert_allclose(got, y, rtol=1e-4, atol=1e-4)
    report = validate(source, tmp_path / "sparse.onnx")
    assert report.passed, [c for c in report.checks if not c.passed]
    assert {s.kernel for s in report.sites} == {recipe.emulated}
    tried = next(c.detail for c in report.checks if c.name == "fallback functions compute what the reference does")
    assert not tried.startswith("0 ")


@pytest.mark.parametrize("entries", [{"pattern": "50%"}, {"pattern": "4:8", "criterion": "clact"}])
def test_a_stale_shape_does_not_break_the_function(tmp_path: Path, entries: dict) -> None:
    proto = mlp()
    proto.graph.value_info.append(helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, [1, 3, 48]))
    source = write(proto, tmp_path / "model.onnx")
    convert(source, tmp_path / "sparse.onnx", Recipe.from_dict(entries))
    for tokens in (3, 7):
        got = make_session(tmp_path / "sparse.onnx").run(None, {"x": weights(1, tokens, 32)})[0]
        assert got.shape == (1, tokens, 32)


def test_validation_finds_a_tampered_threshold(tmp_path: Path) -> None:
    source = write(mlp(), tmp_path / "model.onnx")
    convert(source, tmp_path / "s.onnx", Recipe.from_dict(dict(PRESETS["teal"])), stats=stats_of(source))
    proto = onnx.load(tmp_path / "s.onnx")
    next(t for t in proto.graph.initializer if "threshold" in t.name).raw_data = np.float32(0).tobytes()
    report = validate(source, write(proto, tmp_path / "t.onnx"))
    assert "each pruned layer has one op of its pattern" in [c.name for c in report.checks if not c.passed]


def test_layers_that_share_weights_and_inputs_keep_the_rest_of_the_model(tmp_path: Path) -> None:
    source = write(branches(), tmp_path / "model.onnx")
    convert(source, tmp_path / "sparse.onnx", Recipe.from_dict({"pattern": "100%"}))
    x = weights(5, 32)
    for a, b in zip(*(make_session(p).run(None, {"x": x}) for p in (source, tmp_path / "sparse.onnx")), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"pattern": "0%"}, "above 0%"),
        ({"pattern": "101%"}, "at most 100%"),
        ({"pattern": "5.00001%"}, "four decimals"),
        ({"pattern": "8:16", "scope": "call"}, "write 50%"),
        ({"pattern": "50%", "criterion": "anti", "scope": "threshold"}, "no threshold"),
        ({"pattern": "50%", "mitigations": ["bias"]}, "nothing that is fitted"),
        ({"pattern": "50%", "kernel": "fused"}, "kernel fused"),
        ({"pattern": "50%", "order": "deal"}, "order"),
        ({"pattern": "50%", "allocate": "forward"}, "no allocation"),
        ({"pattern": "50%", "patterns": {"down": "8:16"}}, "one kind"),
        ({"pattern": "100%", "scope": "threshold"}, "take less"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(entries: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Recipe.from_dict(entries)


def test_a_share_too_small_for_a_layer_and_an_old_opset_are_refused(tmp_path: Path) -> None:
    source = write(mlp(), tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="keep a larger share"):
        convert(source, None, Recipe.from_dict({"pattern": "1%"}))
    with pytest.raises(UsageError, match="opset 15"):
        convert(write(mlp(opset=13), tmp_path / "old.onnx"), None, Recipe.from_dict({"pattern": "50%"}))


@pytest.mark.parametrize("text", ["50%", "12.5%", "0.0001%", "100%"])
def test_a_share_is_read_and_written_as_one(text: str) -> None:
    share = Pattern.parse(text)
    assert isinstance(share, Share) and str(share) == text
    assert Recipe.from_dict({"pattern": text}).pattern == share


@pytest.mark.parametrize("value", ["0", [0, "last"], [True], 1.5])
def test_dense_blocks_are_numbers(value: object) -> None:
    assert Recipe.from_dict({"dense_blocks": [0, -1]}).dense_blocks == (0, -1)
    with pytest.raises(UsageError, match="block numbers"):
        Recipe.from_dict({"dense_blocks": value})


@pytest.mark.parametrize("own", [{"pattern": "50%"}, {"prune": "weights"}])
@pytest.mark.parametrize("policy", [{"phase": "prefill"}, {"dense_prefix": 4}])
def test_ops_without_a_kernel_prune_every_token(own, policy) -> None:
    with pytest.raises(UsageError, match=r"phase|prefix"):
        Recipe.from_dict({**own, **policy})

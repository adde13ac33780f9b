"""The baseline that prunes weights: against torch and numpy, in whole models of every layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from small_models import mlp, model, weights, write
from test_treatment import branches

from nmonnx.commands.conversion import conversion
from nmonnx.convert import convert
from nmonnx.errors import InputError, UsageError
from nmonnx.library import make_session
from nmonnx.onnx_file.weight_pruning import prune_weight
from nmonnx.pattern import Pattern
from nmonnx.pruning.recipe import Recipe
from nmonnx.validate import validate


def test_groups_lie_along_the_input_channels_of_each_output() -> None:
    torch = pytest.importorskip("torch")
    weight = torch.from_numpy(weights(24, 32))  # [out, K], as the authors prune it
    groups = weight.reshape(-1, 8)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter(1, groups.abs().topk(3, dim=1).indices, True)
    want = (groups * mask).reshape(24, 32).numpy()
    np.testing.assert_array_equal(prune_weight(weight.numpy(), Pattern(3, 8), channels=1), want)
    np.testing.assert_array_equal(prune_weight(weight.numpy().T, Pattern(3, 8)), want.T)


def test_a_share_is_kept_of_the_whole_layer_and_what_equals_its_threshold_stays() -> None:
    weight = weights(20, 30)
    kept = prune_weight(weight, Pattern.parse("30%"))
    assert np.count_nonzero(kept) == 180
    assert np.abs(weight[kept == 0]).max() < np.abs(kept[kept != 0]).min()
    np.testing.assert_array_equal(prune_weight(np.ones((4, 5), np.float16), Pattern.parse("10%")), np.ones((4, 5)))
    np.testing.assert_array_equal(prune_weight(weight, Pattern.parse("100%")), weight)


@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
@pytest.mark.parametrize("pattern", ["2:8", "25%"])
def test_a_converted_model_computes_with_the_pruned_weights_only(tmp_path: Path, pattern: str, external: bool) -> None:
    source = write(mlp(), tmp_path / "m.onnx", external)
    done = convert(source, tmp_path / "w.onnx", Recipe.from_dict({"pattern": pattern, "prune": "weights"}))
    up, down = (numpy_helper.to_array(t) for t in onnx.load(source).graph.initializer)
    x = weights(1, 3, 32)
    cut = Pattern.parse(pattern)
    want = np.maximum(x @ prune_weight(up, cut), 0) @ prune_weight(down, cut)
    got = make_session(tmp_path / "w.onnx", library=False).run(None, {"x": x})[0]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert [(r["status"], r["kernel"], r["pattern"]) for r in done.records] == [("pruned", "weights", pattern)] * 2
    assert "baseline" in " ".join(conversion(done).words)
    with pytest.raises(InputError, match="baseline with pruned weights"):
        validate(source, tmp_path / "w.onnx")


def test_other_readers_of_a_weight_keep_it_and_half_weights_stay_half(tmp_path: Path) -> None:
    source = write(branches(), tmp_path / "m.onnx")
    one = {"pattern": "2:8", "prune": "weights"}
    convert(source, tmp_path / "w.onnx", Recipe.from_dict({**one, "include": ["d"]}))
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "w.onnx").graph.initializer}
    pruned = next(values for name, values in stored.items() if name.endswith("weight_pruned"))
    np.testing.assert_array_equal(pruned, prune_weight(stored["s"], Pattern(2, 8)))
    x = weights(5, 32)
    old, new = (make_session(p).run(["y", "z", "kept"], {"x": x}) for p in (source, tmp_path / "w.onnx"))
    for a, b in zip(old[::2], new[::2], strict=True):
        np.testing.assert_array_equal(a, b)
    half = model(
        """h (float[t, 16] x) => (float[t, 8] y) { w32 = Cast <to = 1> (w) y = Gemm <transB = 1> (x, w32) }""",
        w=weights(8, 16, dtype=np.float16),
    )
    convert(write(half, tmp_path / "h.onnx"), tmp_path / "hw.onnx", Recipe.from_dict(one))
    tensor = onnx.load(tmp_path / "hw.onnx").graph.initializer[0]
    want = prune_weight(numpy_helper.to_array(half.graph.initializer[0]), Pattern(2, 8), 1)
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), want)


@pytest.mark.parametrize("entry", [{"criterion": "wina"}, {"mitigations": ["var"]}, {"order": "deal"}])
def test_what_concerns_activations_is_refused(entry: dict) -> None:
    with pytest.raises(UsageError, match="by their magnitude alone"):
        Recipe.from_dict({"prune": "weights", **entry})

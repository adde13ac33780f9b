"""Another model goes on with the cache: the losses are those of whole windows, and each half is pruned by its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nmonnx.convert import convert
from nmonnx.errors import UsageError
from nmonnx.evaluation.handover import second_part_losses
from nmonnx.evaluation.perplexity import window_losses
from nmonnx.evaluation.phases import phases
from nmonnx.inference.decoder import Decoder
from nmonnx.pruning.recipe import Recipe

ROWS = np.random.default_rng(5).integers(0, 512, (2, 40))
NAMES = ["llama-genai-fp32", "llama-optimum-fp32"]


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_one_model_twice_gives_the_losses_of_whole_windows(zoo, name: str, one_by_one: bool) -> None:
    first, second = Decoder(zoo(name), threads=1), Decoder(zoo(name), threads=1)
    want = window_losses(first, ROWS)[:, 15:]
    np.testing.assert_allclose(second_part_losses(first, second, ROWS, 15, one_by_one), want, atol=1e-4)
    np.testing.assert_allclose(second_part_losses(first, first, ROWS, 15, one_by_one), want, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_sparse_prefill_and_sparse_decoding_lie_apart(zoo, tmp_path: Path, name: str) -> None:
    convert(zoo(name), tmp_path / "sparse.onnx", Recipe.from_dict({"pattern": "2:8"}))
    dense, sparse = Decoder(zoo(name), threads=1), Decoder(tmp_path / "sparse.onnx", threads=1)
    found = {
        (a is sparse, b is sparse): second_part_losses(a, b, ROWS, 15) for a in (dense, sparse) for b in (dense, sparse)
    }
    np.testing.assert_allclose(found[True, True], window_losses(sparse, ROWS)[:, 15:], atol=1e-4)
    for a, b in (((True, False), (False, False)), ((False, True), (True, True)), ((True, False), (False, True))):
        assert np.abs(found[a] - found[b]).max() > 1e-3


def test_what_cannot_be_is_refused(zoo) -> None:
    cached, plain = Decoder(zoo(NAMES[0])), Decoder(zoo("llama-dynamo-fp32"))
    for split in (0, 39):
        with pytest.raises(UsageError, match="split"):
            second_part_losses(cached, cached, ROWS, split)
    with pytest.raises(UsageError, match="cache"):
        second_part_losses(cached, plain, ROWS, 15)
    with pytest.raises(UsageError, match="cache"):
        second_part_losses(plain, plain, ROWS, 15)


def test_phases_tell_each_mixture_beside_the_dense_model(zoo, tmp_path: Path) -> None:
    convert(zoo(NAMES[0]), tmp_path / "sparse.onnx", Recipe.from_dict({"pattern": "2:8"}))
    dense, sparse = zoo(NAMES[0]), tmp_path / "sparse.onnx"
    told = phases([dense, sparse], ROWS.reshape(-1), 15, window=40, threads=1)
    assert [(p.first, p.second) for p in told] == [(dense, dense), (dense, sparse), (sparse, dense), (sparse, sparse)]
    for phase in told:
        losses = second_part_losses(Decoder(phase.first, threads=1), Decoder(phase.second, threads=1), ROWS, 15)
        assert phase.loss == pytest.approx(losses.mean(), abs=1e-6)
        assert phase.difference == pytest.approx(phase.loss - told[0].loss, abs=1e-9)
    with pytest.raises(UsageError, match="conversion"):
        phases([dense], ROWS.reshape(-1), 15)

"""`nmonnx fit` with mitigations that are learned: from a text to a valid model that predicts better."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_llama
from test_cli import refused

from nmonnx.convert import convert
from nmonnx.errors import UsageError
from nmonnx.fitting.fit import Fit, fit
from nmonnx.fitting.learned import Learning
from nmonnx.inference.decoder import Decoder
from nmonnx.models import build
from nmonnx.pattern import Pattern
from nmonnx.pruning.mitigations import LEARNED
from nmonnx.pruning.recipe import Recipe
from nmonnx.validate import validate

torch = pytest.importorskip("torch")
import nmonnx.learn  # noqa: E402

WINDOW = 32
SEEN = np.random.default_rng(3).integers(0, 512, 24 * WINDOW)
HOW, LEARNING = Fit(threads=1), Learning(epochs=2, rate=2e-3, window=WINDOW)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    source = tiny_llama.write_folder(folder / "source", tiny_llama.CONFIG, tiny_llama.weights(tiny_llama.CONFIG))
    return build(source, folder / "built")


def predictions(path: Path) -> np.ndarray:
    """log p of each next token, [T, V] float64."""
    logits = Decoder(path, threads=1).score(SEEN[None, :WINDOW])[0].astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("kernel", ["fused", "prune"])
@pytest.mark.parametrize("name", LEARNED)
def test_what_is_learned_folds_and_is_valid(llama, tmp_path, name, kernel):
    recipe = Recipe(pattern=Pattern(2, 8), kernel=kernel, mitigations=(name,), rank=2)
    found = fit(llama, recipe, tmp_path / "fit.npz", SEEN, how=HOW, label="words", learning=LEARNING)
    regime = "end-to-end" if name == "distil" else "by-layers"
    assert found.sites and found.protocol.startswith(f"words: {name} learned {regime}")
    assert not (tmp_path / "fit.checkpoint").exists()
    done = convert(llama, tmp_path / "sparse.onnx", recipe, fit=found)
    fold = next(p for p in done.passes if p.name == "fold-corrections")
    assert (fold.changed, fold.left) == (len(found.sites), dict(found.refused))
    assert [f"{c.name}: {c.detail}" for c in validate(llama, done.out).checks if not c.passed] == []


def test_whole_weights_bring_the_predictions_nearer_to_the_original(llama, tmp_path):
    plain = Recipe(pattern=Pattern(2, 8))
    recipe = Recipe(pattern=Pattern(2, 8), mitigations=("distil",))
    learning = Learning("end-to-end", 4, 2e-3, WINDOW)
    found = fit(llama, recipe, tmp_path / "fit.npz", SEEN, how=HOW, learning=learning)
    outs = (convert(llama, tmp_path / "a.onnx", plain).out, convert(llama, tmp_path / "b.onnx", recipe, fit=found).out)
    want = predictions(llama)
    before, after = ((np.exp(want) * (want - predictions(out))).sum(axis=-1).mean() for out in outs)
    assert after < 0.9 * before


def test_names_are_those_that_can_be_learned():
    assert set(LEARNED) == set(nmonnx.learn.LEARNED)


def test_settings_of_learning_are_checked(llama, tmp_path):
    recipe = Recipe(mitigations=("ls",))
    with pytest.raises(UsageError, match="regime 'all'"):
        fit(llama, recipe, tmp_path / "fit.npz", SEEN, learning=Learning("all"))
    text = tmp_path / "text.txt"
    text.write_text("words")
    said = refused(tmp_path, 2, "fit", llama, "--text", text, "--mitigation", "bias", "--lr", "0.1")
    assert "--lr is for mitigations that are learned" in said

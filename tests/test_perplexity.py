"""Perplexity: every number equals the direct computation on whole windows."""

from __future__ import annotations

import math

import numpy as np
import onnxruntime as ort
import pytest

from nmonnx.errors import InputError, UsageError
from nmonnx.evaluation.perplexity import perplexity
from nmonnx.inference.decoder import Decoder

TOKENS = np.random.default_rng(5).integers(0, 512, 200)


def _direct(path, tokens: np.ndarray, window: int, stride: int) -> list[np.ndarray]:
    """Losses of each window's newly predicted tokens, from a graph without a cache and torch's cross entropy."""
    torch = pytest.importorskip("torch")
    session = ort.InferenceSession(path)
    losses, end = [], 0
    for start in range(0, len(tokens) - window + 1, stride):
        rows = tokens[None, start : start + window]
        logits = session.run(["logits"], {"input_ids": rows, "attention_mask": np.ones_like(rows)})[0][0]
        loss = torch.nn.functional.cross_entropy(
            torch.from_numpy(logits[:-1]).double(), torch.from_numpy(rows[0, 1:]), reduction="none"
        )
        losses.append(loss.numpy()[max(end - start - 1, 0) :])
        end = start + window
    return losses


@pytest.mark.parametrize("window, stride", [(32, 32), (32, 12), (64, 1), (128, 50)])
@pytest.mark.parametrize("name", ["llama-genai-fp32", "llama-optimum-fp32"])
def test_perplexity_equals_cross_entropy_of_another_exporters_graph(zoo, name, window, stride):
    expected = _direct(zoo("llama-dynamo-fp32"), TOKENS[:140], window, stride)
    found = perplexity(Decoder(zoo(name), threads=1), TOKENS[:140], window, stride)
    assert found.nll == pytest.approx(np.concatenate(expected).mean(), abs=1e-6)
    assert found.ppl == pytest.approx(math.exp(found.nll))
    assert found.tokens == sum(map(len, expected))
    assert found.window_nll == pytest.approx([x.mean() for x in expected], abs=1e-6)


def test_with_overlap_every_token_is_predicted_once(zoo):
    found = perplexity(Decoder(zoo("llama-genai-fp32"), threads=1), TOKENS[:92], window=32, stride=12)
    assert (found.windows, found.tokens) == (6, 91)


@pytest.mark.parametrize("name", ["llama-genai-fp32", "llama-optimum-fp32", "llama-dynamo-fp32"])
def test_rows_side_by_side_and_pieces_change_nothing(zoo, monkeypatch, name):
    decoder = Decoder(zoo(name), threads=1)
    one = perplexity(decoder, TOKENS, window=40)
    assert perplexity(decoder, TOKENS, window=40, batch=3).window_nll == pytest.approx(one.window_nll, abs=1e-6)
    monkeypatch.setattr("nmonnx.evaluation.perplexity._PIECE", 7)
    monkeypatch.setattr("nmonnx.evaluation.perplexity._ROWS", 3)
    assert perplexity(decoder, TOKENS, window=40).window_nll == pytest.approx(one.window_nll, abs=1e-6)


def test_windows_follow_one_another_and_the_protocol_says_so(zoo):
    done: list[tuple[int, int]] = []
    decoder = Decoder(zoo("llama-genai-fp32"), threads=1)
    found = perplexity(decoder, TOKENS, window=50, max_windows=3, progress=lambda *step: done.append(step))
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert (found.windows, found.tokens) == (3, 147)
    assert found.protocol == "3 windows of 50 tokens, stride 50, empty cache, no BOS"
    assert found.window_nll == perplexity(decoder, TOKENS[:150], window=50).window_nll


def test_a_text_shorter_than_a_window_is_one_window(zoo):
    found = perplexity(Decoder(zoo("llama-genai-fp32"), threads=1), TOKENS[:20], window=100)
    assert (found.windows, found.tokens) == (1, 19)
    assert found.protocol.startswith("1 windows of 20 tokens")


WRONG = {
    "a window of 129 tokens is more than the 128": {"window": 129},
    "window 1 must be at least 2": {"window": 1},
    "stride 41 between": {"window": 40, "stride": 41},
    "0 windows are too few": {"window": 40, "max_windows": 0},
}


@pytest.mark.parametrize("message, options", WRONG.items(), ids=WRONG.keys())
def test_windows_that_cannot_be_are_refused(zoo, message, options):
    with pytest.raises(UsageError, match=message):
        perplexity(Decoder(zoo("llama-genai-fp32"), threads=1), TOKENS, **options)


@pytest.mark.parametrize("tokens, message", [(TOKENS[:1], "two tokens"), (TOKENS + 400, "belongs to the model")])
def test_texts_that_cannot_be_read_are_refused(zoo, tokens, message):
    with pytest.raises(InputError, match=message):
        perplexity(Decoder(zoo("llama-genai-fp32"), threads=1), tokens, window=50)

"""Decoding: with a cache or without, in pieces or at once, the logits are those of one call on the whole prefix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import toy_decoders

from nmonnx.errors import InputError, ModelError, NmonnxError, RunError
from nmonnx.inference.decoder import Decoder
from nmonnx.inference.decoder_cache import Growing, InPlace, Rerun
from nmonnx.library import make_session

GENAI = ["llama-genai-fp32", "llama-genai-fp32-gateup", "llama-genai-fp32-nofuse", "llama-genai-int4-acc1"]
GENAI += ["smollm-genai-fp32", "smollm-genai-fp32-shared", "mistral-genai-fp32", "phi3-genai-fp32"]
GENAI += ["qwen2-genai-fp32", "qwen3-genai-fp32", "gemma2-genai-fp32"]
OPTIMUM = ["llama-optimum-fp32", "llama-optimum-O1", "llama-optimum-O2", "gpt2-optimum-fp32", "gpt2-optimum-O2"]
OPTIMUM += ["gptneox-optimum-fp32", "phi-optimum-fp32", "qwen2-optimum-fp32", "qwen3-optimum-fp32"]
OPTIMUM += ["qwen3moe-optimum-fp32", "gemma2-optimum-fp32", "gemma3-optimum-fp32", "gptoss-optimum-fp32"]
OPTIMUM += ["smollm-optimum-fp32"]
DYNAMO = ["llama-dynamo-kv-fp32", "gpt2-dynamo-kv-fp32", "phi3-dynamo-kv-fp32", "qwen3-dynamo-kv-fp32"]
QUANTISED = ["llama-ortq-q4", "llama-ortq-q8nbits", "llama-ortq-bnb4", "llama-ortq-staticqdq"]
ROUNDS_ACTIVATIONS = ["llama-genai-int4", "llama-genai-int4qdq", "llama-genai-int8", "gemma2-genai-int4"]
ROUNDS_ACTIVATIONS += ["mistral-genai-int4", "phi3-genai-int4", "qwen2-genai-int4", "smollm-genai-int4"]
ROUNDS_ACTIVATIONS += ["llama-ortq-q4qdq", "llama-ortq-dynint8"]
VARIANTS = ["llama-ext-onefile", "llama-ext-perTensor", "llama-synth-functions", "llama-synth-initinputs"]
HALF = ["llama-genai-fp16cuda", "llama-genai-fp16dml", "phi3-genai-fp16cuda", "qwen2-genai-fp16cuda"]
HALF += ["gptoss-genai-fp16cuda", "llama-optimum-fp16"]

SAME_WEIGHTS = {
    "llama-genai-fp32": "llama-dynamo-fp32",
    "llama-optimum-fp32": "llama-dynamo-fp32",
    "llama-dynamo-kv-fp32": "llama-dynamo-fp32",
    "gpt2-optimum-fp32": "gpt2-dynamo-fp32",
    "gpt2-dynamo-kv-fp32": "gpt2-dynamo-fp32",
    "gemma2-genai-fp32": "gemma2-dynamo-fp32",
    "mistral-genai-fp32": "mistral-dynamo-fp32",
    "qwen3-genai-fp32": "qwen3-dynamo-fp32",
    "phi3-genai-fp32": "phi3-dynamo-fp32",
    "smollm-genai-fp32": "smollm-dynamo-fp32",
}
NAMES = {
    "optimum": ("input_ids", "past_key_values.0.key", "past_key_values.0.value", "present.0.key", "present.0.value"),
    "dynamo": ("input_ids", "past_key_values_0_key", "past_key_values_0_value", "present_0_key", "present_0_value"),
    "caches": ("tokens", "key_cache.0", "value_cache.0", "key_cache_out.0", "value_cache_out.0"),
    "short": ("input_ids", "past_k_0", "past_v_0", "new_k_0", "new_v_0"),
    "by order": ("input_ids", "past_a", "past_b", "output_1", "output_2"),
}


def _tokens(decoder: Decoder, rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, decoder.vocab, (rows, length))


def _stepwise(decoder: Decoder, tokens: np.ndarray, prompt: int) -> np.ndarray:
    """Logits after tokens prompt - 1, prompt, ..."""
    steps = [decoder.prefill(tokens[:, :prompt])]
    steps += [decoder.step(tokens[:, i]) for i in range(prompt, tokens.shape[1])]
    return np.stack(steps, axis=1)


@pytest.mark.parametrize("name", GENAI + OPTIMUM + DYNAMO + QUANTISED + VARIANTS)
def test_step_by_step_equals_the_whole_prefix_in_one_call(zoo, name):
    decoder = Decoder(zoo(name), threads=1)
    assert not isinstance(decoder._runner, Rerun)
    tokens = _tokens(decoder, 2, 14)
    np.testing.assert_allclose(_stepwise(decoder, tokens, 5), decoder.score(tokens)[:, 4:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ROUNDS_ACTIVATIONS)
def test_kernels_that_round_activations_to_8_bits_stay_within_that_rounding(zoo, name):
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # without VNNI sums of 8-bit products saturate
    decoder = Decoder(make_session(zoo(name), 1, options=options), path=zoo(name))
    tokens = _tokens(decoder, 2, 14)
    logits = decoder.score(tokens)[:, 4:]
    assert np.abs(logits).max() > 1
    np.testing.assert_allclose(_stepwise(decoder, tokens, 5), logits, atol=0.15, rtol=0)


@pytest.mark.parametrize("name", HALF)
def test_half_precision_step_by_step_equals_the_prefix_within_its_rounding(zoo, name):
    decoder = Decoder(zoo(name), threads=1)
    tokens = _tokens(decoder, 1, 14)
    logits = decoder.score(tokens)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(_stepwise(decoder, tokens, 5), logits[:, 4:], atol=5e-3, rtol=0)


@pytest.mark.parametrize("name", GENAI + OPTIMUM + DYNAMO)
def test_pieces_equal_one_call(zoo, name):
    decoder = Decoder(zoo(name), threads=1)
    tokens = _tokens(decoder, 1, 23)
    pieces = list(decoder.score_pieces(tokens, chunk=8))
    assert [start for start, _ in pieces] == [0, 8, 16]
    together = np.concatenate([logits for _, logits in pieces], axis=1)
    np.testing.assert_allclose(together, decoder.score(tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name, reference", SAME_WEIGHTS.items())
def test_cached_decoding_equals_another_exporters_graph_without_a_cache(zoo, name, reference):
    decoder = Decoder(zoo(name), threads=1)
    tokens = _tokens(decoder, 1, 12)
    session = ort.InferenceSession(zoo(reference))
    whole = session.run(None, {"input_ids": tokens, "attention_mask": np.ones_like(tokens)})[0]
    np.testing.assert_allclose(_stepwise(decoder, tokens, 3), whole[:, 2:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama-optimum-merged", "gpt2-optimum-merged"])
def test_a_merged_decoder_switches_to_its_cache_branch(zoo, name):
    merged = Decoder(zoo(name).with_name("decoder_model_merged.onnx"), threads=1)
    plain = Decoder(zoo(name.replace("merged", "fp32")), threads=1)
    tokens = _tokens(plain, 1, 16)
    pieces = np.concatenate([logits for _, logits in merged.score_pieces(tokens, chunk=8)], axis=1)
    np.testing.assert_allclose(pieces, plain.score(tokens), atol=1e-4, rtol=0)


def test_a_head_that_gives_the_last_position_only_is_scored_token_by_token(zoo):
    pruned, full = Decoder(zoo("llama-genai-fp32-prunehead"), 1), Decoder(zoo("llama-genai-fp32"), 1)
    tokens = _tokens(full, 2, 9)
    np.testing.assert_allclose(pruned.score(tokens), full.score(tokens), atol=1e-4, rtol=0)
    np.testing.assert_allclose(pruned.prefill(tokens), full.prefill(tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES.keys())
def test_every_naming_of_the_cache_decodes_as_computed_by_hand(tmp_path, names, merged):
    renamed = dict(zip(("ids", "pk", "pv", "nk", "nv"), names, strict=True))
    decoder = Decoder(toy_decoders.split_cache(tmp_path / "toy.onnx", renamed, merged), threads=1)
    assert isinstance(decoder._runner, Growing)
    _check_toy(decoder)


def test_keys_and_values_in_one_tensor_decode_as_computed_by_hand(tmp_path):
    path = toy_decoders.stacked_cache(tmp_path / "toy.onnx", {"ids": "input_ids", "pk": "past_0", "nk": "present_0"})
    _check_toy(Decoder(path, threads=1))


def _check_toy(decoder: Decoder) -> None:
    tokens = np.random.default_rng(1).integers(0, toy_decoders.VOCAB, (3, 9))
    expected = toy_decoders.expected_logits(tokens)
    np.testing.assert_allclose(_stepwise(decoder, tokens, 4), expected[:, 3:], atol=1e-5)
    np.testing.assert_allclose(decoder.score(tokens), expected, atol=1e-5)


def test_a_prompt_forgets_the_one_before(zoo):
    for name in ("llama-genai-fp32", "llama-optimum-fp32", "llama-dynamo-fp32"):
        decoder = Decoder(zoo(name), threads=1)
        tokens = _tokens(decoder, 1, 7)
        first = _stepwise(decoder, tokens, 4)
        decoder.prefill(_tokens(decoder, 2, 11, seed=1))
        assert np.array_equal(_stepwise(decoder, tokens, 4), first)


def test_outgrown_buffers_keep_what_was_read(zoo, monkeypatch):
    monkeypatch.setattr("nmonnx.inference.decoder_cache._LEAST_CAPACITY", 4)
    decoder = Decoder(zoo("llama-genai-fp32"), threads=1)
    tokens = _tokens(decoder, 2, 40)
    whole = decoder.score(tokens)
    decoder = Decoder(zoo("llama-genai-fp32"), threads=1)
    assert isinstance(decoder._runner, InPlace)
    stepwise = _stepwise(decoder, tokens, 1)
    assert decoder._runner._capacity < 128
    np.testing.assert_allclose(stepwise, whole, atol=1e-4)


def test_a_graph_of_one_fixed_length_is_padded(zoo):
    decoder = Decoder(zoo("llama-dyndefault-fp32"), threads=1)
    free = Decoder(zoo("llama-dynamo-fp32"), threads=1)
    tokens = _tokens(free, 2, 6)
    np.testing.assert_allclose(decoder.score(tokens), free.score(tokens), atol=1e-4)
    np.testing.assert_allclose(_stepwise(decoder, tokens, 2), free.score(tokens)[:, 1:], atol=1e-4)
    with pytest.raises(InputError, match="9 tokens are more than the 8"):
        decoder.score(_tokens(free, 2, 9))
    with pytest.raises(InputError, match=r"takes int64 \[2, 8\]"):
        decoder.score(tokens[:1])


def test_a_trace_of_one_length_says_so(zoo):
    with pytest.raises(RunError, match="traced for one length only"):
        Decoder(zoo("llama-ts-fp32"), threads=1).score(np.ones((1, 5), np.int64))


def test_the_context_is_a_limit(zoo):
    decoder = Decoder(zoo("llama-genai-fp32"), threads=1)
    decoder.prefill(_tokens(decoder, 1, 127))
    decoder.step(np.array([1]))
    with pytest.raises(InputError, match="129 tokens are more than the 128"):
        decoder.step(np.array([1]))


@pytest.mark.parametrize("tokens", [np.zeros(3, np.int64), np.zeros((1, 0), np.int64), np.array([[-1]])])
def test_tokens_that_are_no_filled_matrix_of_ids_are_refused(zoo, tokens):
    with pytest.raises(InputError):
        Decoder(zoo("llama-optimum-fp32"), threads=1).prefill(tokens)


def test_a_model_that_does_not_load_is_a_model_error(zoo):
    with pytest.raises(ModelError, match="llama-dynamo-bf16"):
        Decoder(zoo("llama-dynamo-bf16"), threads=1)


REFUSED = {
    "llama-genai-fp32-nohead/model.onnx": "not in logits",
    "public/onnxruntime-genai/phi3-v/dummy_text.onnx": "takes no token ids",
    "public/onnxruntime-genai/marian-batch/decoder.onnx": r"takes no token ids \[batch, length\] .*input_ids \[2\]",
    "public/onnxruntime-genai/whisper/dummy_decoder.onnx": "past_key_cross_0",
    "public/onnxruntime-genai/multimodal-decoder-with-input-ids/dummy_text.onnx": "inputs_embeds",
    "public/onnxruntime-genai/engine/synthetic-paged/decoder.onnx": "paged",
    "public/optimum-onnx-tests-assets-model.onnx": "no logits output",
}


@pytest.mark.parametrize("name, reason", REFUSED.items())
def test_a_graph_that_text_cannot_drive_is_refused_with_the_reason(shared: Path, name, reason):
    with pytest.raises(NmonnxError, match=reason):
        Decoder(shared / "zoo" / name, threads=1)

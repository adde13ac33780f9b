"""Feeds: every input of every exporter's graph gets an array that the graph runs with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from conftest import SHARED

from nmonnx.errors import InputError, RunError
from nmonnx.feeds import Past, make_feeds, plan_feeds, sample_feeds, signature, vocabulary
from nmonnx.feeds.signature import Port, Signature

ZOO = sorted(str(p.relative_to(SHARED / "zoo")) for p in (SHARED / "zoo").rglob("*.onnx"))
DOES_NOT_LOAD = {
    "llama-conv-fp16-keep_io": "Type Error",
    "llama-conv-fp16-keepio": "Type Error",
    "llama-conv-fp16-plain": "Type Error",
    "llama-ortq-q4f16": "Type Error",
    "llama-dynamo-bf16": "NOT_IMPLEMENTED",
    "llama-genai-bf16cuda": "NOT_IMPLEMENTED",
}
DOES_NOT_RUN = {
    "phi-genai-fp32": "cos_cache dimension 1 must be",
    "qwen3-genai-fp16cuda": "q_norm_weight / k_norm_weight inputs are not supported",
}
TRACED_FOR_ONE_LENGTH = {"gemma3-ts-kv-fp32", "llama-ts-kv-fp32", "mixtral-ts-kv-fp32", "phi3-ts-kv-fp32"}
TRACED_FOR_ONE_LENGTH |= {"qwen3-ts-kv-fp32", "llama-optimum-merged", "gpt2-optimum-merged"}
PAGED = "public/onnxruntime-genai/engine/synthetic-paged/decoder.onnx"


@dataclass
class Arg:
    """What a session says of an input or output."""

    name: str
    type: str = "tensor(int64)"
    shape: Sequence[int | str | None] = ()


@dataclass
class FakeSession:
    inputs: list[Arg]
    outputs: list[Arg]

    def get_inputs(self) -> list[Arg]:
        return self.inputs

    def get_outputs(self) -> list[Arg]:
        return self.outputs


LOGITS = Arg("logits", "tensor(float)", ["b", "t", 50])
IDS = Arg("input_ids", shape=["b", "t"])


def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.skipif(not ZOO, reason="the folder ../shared/zoo is not there")
@pytest.mark.parametrize("name", ZOO)
def test_every_model_that_loads_runs_with_its_sampled_feeds(name):
    path, folder = SHARED / "zoo" / name, name.split("/")[0]
    if folder in DOES_NOT_LOAD:
        with pytest.raises(Exception, match=DOES_NOT_LOAD[folder]):
            _session(path)
        return
    session = _session(path)
    if name == PAGED:
        with pytest.raises(InputError, match="paged"):
            plan_feeds(session, path, _rng())
        return
    samples = plan_feeds(session, path, _rng())
    if folder in DOES_NOT_RUN:
        assert not samples.feeds
        assert DOES_NOT_RUN[folder] in samples.skipped[0][1]
        with pytest.raises(RunError, match=DOES_NOT_RUN[folder]):
            sample_feeds(session, path, _rng())
        return
    assert samples.feeds
    sig = signature(session, path)
    for feed in samples.feeds:
        session.run(None, feed.arrays)
        _check_sizes(sig, feed.arrays)
    if sig.has_cache and (sig.first("tokens") or sig.first("embeds")):
        assert ("decode" in {f.name for f in samples.feeds}) == (folder not in TRACED_FOR_ONE_LENGTH)


def _check_sizes(sig: Signature, arrays: dict[str, np.ndarray]) -> None:
    """A symbolic size of the tokens, the mask and the positions is the same wherever its name occurs; ids exist."""
    sizes: dict[str, int] = {}
    for port in sig.inputs:
        if port.role in ("tokens", "mask", "positions", "embeds"):
            for dim, size in zip(port.shape, arrays[port.name].shape, strict=True):
                if isinstance(dim, str):
                    assert sizes.setdefault(dim, size) == size
        if port.role == "tokens":
            assert arrays[port.name].min() >= 0 and arrays[port.name].max() < vocabulary(sig)


@pytest.mark.parametrize(
    "arg, role",
    [
        (IDS, "tokens"),
        (Arg("decoder_input_ids", "tensor(int32)", ["b", "t"]), "tokens"),
        (Arg("attention_mask", shape=["b", "n"]), "mask"),
        (Arg("attention_mask", "tensor(float)", ("b", 1, "t", "n")), "causal_mask"),
        (Arg("position_ids", shape=(3, "b", "t")), "positions"),
        (Arg("cache_position", shape=["t"]), "positions"),
        (Arg("past_key_values.0.key", "tensor(float)", ["b", 2, "p", 8]), "past"),
        (Arg("past_key_values_0_key", "tensor(float)", ["b", 2, "p", 8]), "past"),
        (Arg("key_cache.0", "tensor(float16)", [None, 2, None, 8]), "past"),
        (Arg("past_0", "tensor(float)", [2, "b", 4, "past_seq_len", 8]), "past"),
        (Arg("past_conv.0", "tensor(float)", ["b", 32, 4]), "state"),
        (Arg("past_key_values.0.recurrent_state", "tensor(float)", ["b", 16, 8, 8]), "state"),
        (Arg("past_key_cross_0", "tensor(float)", ["b", 6, 1500, 64]), "other"),
        (Arg("use_cache_branch", "tensor(bool)", [1]), "use_cache"),
        (Arg("num_logits_to_keep"), "keep_logits"),
        (Arg("seqlens_k", "tensor(int32)", ["b"]), "seqlens"),
        (Arg("total_sequence_length", "tensor(int32)"), "total"),
        (Arg("past_key_values_length", shape=[1]), "past_length"),
        (Arg("pixel_values", "tensor(float)", ["n", 3, "h", "w"]), "other"),
        (Arg("pixel_position_ids", shape=["n", 2]), "other"),
        (Arg("inputs_embeds", "tensor(float)", ["b", "t", 64]), "embeds"),
    ],
    ids=lambda value: value.name if isinstance(value, Arg) else value,
)
def test_an_input_is_classified_by_name_type_and_shape(arg, role):
    others = [] if role in ("tokens", "embeds") else [IDS]
    found = signature(FakeSession([*others, arg], [LOGITS])).inputs[-1]
    assert found.role == role


def test_the_only_integer_matrix_of_an_unnamed_graph_is_the_tokens():
    sig = signature(FakeSession([Arg("onnx::Gather_0", shape=["b", "t"])], [LOGITS]))
    assert [p.name for p in sig.of("tokens")] == ["onnx::Gather_0"]


def test_past_and_present_are_paired_by_name_whatever_their_order():
    shape = ("b", 2, "p", 8)
    pasts = [Arg(f"past_key_values.{i}.{k}", "tensor(float)", shape) for k in ("key", "value") for i in (0, 1, 10)]
    presents = [Arg(f"present.{i}.{k}", "tensor(float)", shape) for i in (10, 1, 0) for k in ("value", "key")]
    sig = signature(FakeSession([IDS, *pasts], [LOGITS, *presents]))
    assert len(sig.cache) == 6
    assert all(present == past.replace("past_key_values", "present") for past, present in sig.cache)


def test_a_head_size_that_the_graph_leaves_open_comes_from_the_json_file_beside_it(tmp_path):
    past = Arg("past_key_values.0.key", "tensor(float)", ["b", 2, "p", "kv_cache_dim"])
    session = FakeSession([IDS, past], [LOGITS])
    with pytest.raises(InputError, match=r"past_key_values.0.key.*head size"):
        make_feeds(signature(session, tmp_path / "model.onnx"), np.ones((1, 3), np.int64))
    (tmp_path / "genai_config.json").write_text('{"model": {"decoder": {"head_size": 24}}}')
    feeds = make_feeds(signature(session, tmp_path / "model.onnx"), np.ones((1, 3), np.int64), past=5)
    assert feeds[past.name].shape == (1, 2, 5, 24)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_broken_json_file_beside_the_model_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json"):
        signature(FakeSession([IDS], [LOGITS]), tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "content", ['{"model": []}', '{"model": {"decoder": 5}}', '{"model": {"decoder": {"sliding_window": 1}}}']
)
def test_a_json_file_of_another_form_beside_the_model_is_named(tmp_path, content):
    (tmp_path / "genai_config.json").write_text(content)
    with pytest.raises(InputError, match=r"genai_config\.json.*is not a JSON object"):
        signature(FakeSession([IDS], [LOGITS]), tmp_path / "model.onnx")


def test_facts_of_another_type_in_a_json_file_tell_nothing(tmp_path):
    content = '{"hidden_size": 64, "num_attention_heads": "8", "eos_token_id": ["</s>", 2], "vocab_size": Infinity}'
    (tmp_path / "config.json").write_text(content)
    config = signature(FakeSession([IDS], [LOGITS]), tmp_path / "model.onnx").config
    assert (config.hidden, config.head_size, config.vocab, config.eos) == (64, None, None, (2,))


def test_a_sliding_window_cache_is_a_buffer_of_at_least_the_window(zoo):
    path = zoo("gemma2-genai-fp32")
    feeds = make_feeds(signature(_session(path), path), np.ones((1, 3), np.int64))
    assert feeds["past_key_values.0.key"].shape[2] == 64
    assert feeds["attention_mask"].shape == (1, 3)


RAGGED = {
    "right": ([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], [[2, 3, 4, 5], [2, 3, 3, 3]]),
    "left": ([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1]], [[2, 3, 4, 5], [2, 2, 2, 3]]),
}


@pytest.mark.parametrize("pad", RAGGED)
def test_padding_is_masked_out_and_not_counted_in_positions(pad):
    mask = Arg("attention_mask", shape=["b", "n"])
    inputs = [IDS, mask, Arg("position_ids", shape=["b", "t"]), Arg("past_0", "tensor(float)", [2, "b", 1, "p", 4])]
    sig = signature(FakeSession(inputs, [LOGITS]))
    feeds = make_feeds(sig, np.ones((2, 4), np.int64), past=2, lengths=np.array([4, 2]), pad=pad)
    expected_mask, expected_positions = RAGGED[pad]
    assert feeds["attention_mask"].tolist() == expected_mask
    assert feeds["position_ids"].tolist() == expected_positions


def test_a_causal_mask_hides_later_tokens_and_padding():
    mask = Arg("attention_mask", "tensor(float)", ("b", 1, "t", "n"))
    past = Arg("past_0", "tensor(float)", [2, "b", 1, "p", 4])
    sig = signature(FakeSession([IDS, mask, past], [LOGITS]))
    feeds = make_feeds(sig, np.ones((1, 3), np.int64), past=1, lengths=np.array([2]))
    seen = feeds["attention_mask"] == 0
    assert seen.tolist() == [[[[True, True, False, False], [True, True, True, False], [True, True, True, False]]]]
    assert feeds["attention_mask"].min() == np.finfo(np.float32).min


def test_scalars_about_lengths_say_what_they_are_named(tmp_path):
    inputs = [IDS, Arg("seqlens_k", "tensor(int32)", ["b"]), Arg("total_sequence_length", "tensor(int32)")]
    inputs += [Arg("num_logits_to_keep"), Arg("use_cache_branch", "tensor(bool)", [1])]
    inputs += [Arg("past_0", "tensor(float)", [2, "b", 1, "p", 4])]
    sig = signature(FakeSession(inputs, [LOGITS]))
    feeds = make_feeds(sig, np.ones((2, 3), np.int64), past=5, lengths=np.array([3, 1]), keep=1)
    assert feeds["seqlens_k"].tolist() == [7, 5]
    assert feeds["total_sequence_length"] == 8
    assert feeds["num_logits_to_keep"] == 1
    assert feeds["use_cache_branch"].tolist() == [True]
    assert make_feeds(sig, np.ones((2, 3), np.int64))["use_cache_branch"].tolist() == [False]


def test_an_unknown_input_gets_the_sizes_that_known_inputs_give_its_symbols():
    inputs = [IDS, Arg("token_type_ids", shape=["b", "t"]), Arg("image", "tensor(float)", ["images", 3, "images"])]
    feeds = make_feeds(signature(FakeSession(inputs, [LOGITS])), np.ones((2, 5), np.int64))
    assert feeds["token_type_ids"].shape == (2, 5)
    assert feeds["image"].shape[0] == feeds["image"].shape[2]


def test_tokens_that_a_fixed_shape_does_not_take_are_refused():
    sig = signature(FakeSession([Arg("input_ids", shape=[1, 8])], [LOGITS]))
    assert (sig.batch, sig.length) == (1, 8)
    with pytest.raises(InputError, match=r"'input_ids' takes int64 \[1, 8\].*\[1, 5\]"):
        make_feeds(sig, np.ones((1, 5), np.int64))


@pytest.mark.parametrize("name", ["llama-genai-fp32", "llama-optimum-fp32", "qwen3-dynamo-kv-fp32"])
def test_the_decode_feed_continues_the_prompt_feed(zoo, name):
    session = _session(zoo(name))
    feeds = {f.name: f.arrays for f in sample_feeds(session, zoo(name), _rng(), length=7)}
    outputs = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds["prompt"]), strict=True))
    for past, present in signature(session, zoo(name)).cache:
        assert np.array_equal(feeds["decode"][past], outputs[present])
    assert feeds["decode"]["input_ids"].shape == (1, 1)
    assert feeds["decode"]["attention_mask"].shape == (1, 8)


def test_the_unwritten_end_of_a_cache_buffer_is_zero_in_the_decode_feed(zoo):
    path = zoo("gemma2-genai-fp32")
    feeds = {f.name: f.arrays for f in sample_feeds(_session(path), path, _rng(), length=7)}
    cache = feeds["decode"]["past_key_values.1.key"]
    assert cache.shape[2] == 64
    assert cache[:, :, :7].all() and not cache[:, :, 7:].any()


def test_a_cache_of_a_given_length_is_random_with_a_generator_and_zero_without(zoo):
    sig = signature(_session(zoo("llama-optimum-fp32")))
    name, tokens = "past_key_values.0.key", np.ones((2, 1), np.int64)
    assert not make_feeds(sig, tokens, past=6)[name].any()
    assert make_feeds(sig, tokens, past=6, rng=_rng())[name].all()
    given = {name: np.full((2, 2, 6, 16), 3, np.float32)}
    assert make_feeds(sig, tokens, Past(6, given))[name] is given[name]


def test_the_vocabulary_is_the_embedding_table_when_the_outputs_do_not_tell(zoo, tmp_path):
    path = zoo("gpt2-dynamo-direct-fp32")
    assert vocabulary(signature(_session(path), path)) == 512
    unknown = FakeSession([IDS], [Arg("hidden", "tensor(float)", ["b", "t", 4])])
    assert vocabulary(signature(unknown)) == 16


def test_a_graph_without_tokens_gets_random_arrays_of_two_sizes(tmp_path):
    import onnx

    text = '<ir_version: 8, opset_import: ["" : 18]> g (float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "relu.onnx")
    feeds = sample_feeds(_session(tmp_path / "relu.onnx"), tmp_path / "relu.onnx", _rng())
    assert [f.arrays["x"].shape for f in feeds] == [(3, 4), (5, 4)]


def test_an_input_type_without_numpy_arrays_is_refused():
    with pytest.raises(InputError, match="bfloat16"):
        signature(FakeSession([Arg("x", "tensor(bfloat16)", [1])], [LOGITS]))


def test_ports_keep_the_names_of_symbolic_sizes():
    port = signature(FakeSession([IDS], [LOGITS])).first("logits")
    assert port == Port("logits", np.dtype(np.float32), ("b", "t", 50), "logits")

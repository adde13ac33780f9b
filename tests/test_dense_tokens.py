"""Tokens that stay dense by phase and by position, on decoders with positions, a mask, or a cache alone to tell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import toy_decoders
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from small_models import mlp, model, weights, write
from tiny_llama import CONFIG, write_folder
from tiny_llama import weights as llama_weights

from nmonnx import reference
from nmonnx.commands.conversion import conversion
from nmonnx.convert import convert
from nmonnx.errors import UsageError
from nmonnx.inference.decoder import Decoder
from nmonnx.library import make_session
from nmonnx.models import build
from nmonnx.passes.token_policy import TokenPolicy
from nmonnx.passes.token_rows import TokenRows
from nmonnx.pattern import Pattern
from nmonnx.pruning.recipe import Recipe
from nmonnx.validate import validate

NAMES = dict(
    zip(("ids", "pk", "pv", "nk", "nv"), ("input_ids", "past_k_0", "past_v_0", "new_k_0", "new_v_0"), strict=True)
)
IDS = ("input_ids", TensorProto.INT64, ["b", "s"])
POSITIONS = ("position_ids", TensorProto.INT64, ["b", "s"])
MASK = ("attention_mask", TensorProto.INT64, ["b", "t"])
PAST = ("past_key_values.0.key", TensorProto.FLOAT, ["b", 2, "past", 4])


def dense_of(policy: TokenPolicy, feeds: dict[str, np.ndarray], inputs: list[tuple]) -> np.ndarray:
    """What the nodes of a policy make, in the interpreter of onnx."""
    values = [helper.make_tensor_value_info(*i) for i in inputs]
    graph = helper.make_graph([], "g", values, [])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    nodes = policy.nodes(proto)
    graph = helper.make_graph(
        nodes, "g", values, [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.BOOL, ["n"])]
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(proto)
    (got,) = ReferenceEvaluator(proto).run(None, feeds)
    ours = make_session_of(proto).run(None, feeds)[0]
    np.testing.assert_array_equal(got, ours)
    return ours


def make_session_of(proto: onnx.ModelProto):
    import onnxruntime

    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("phase,alone,several", [("prefill", True, False), ("decode", False, True)])
def test_a_phase_is_told_by_the_number_of_tokens_in_a_row(phase: str, alone: bool, several: bool) -> None:
    for rows in (1, 3):
        for length, want in ((1, alone), (2, several), (9, several)):
            got = dense_of(TokenPolicy(phase), {"input_ids": np.zeros((rows, length), np.int64)}, [IDS])
            assert got.tolist() == [want]


@pytest.mark.parametrize("told", ["positions", "mask", "past"])
@pytest.mark.parametrize("past,length", [(0, 5), (2, 3), (3, 1), (0, 1), (6, 2), (0, 0)])
def test_the_first_positions_are_dense_whatever_tells_them(told: str, past: int, length: int) -> None:
    feeds: dict[str, np.ndarray] = {"input_ids": np.zeros((2, length), np.int64)}
    inputs = [IDS]
    if told == "positions":
        inputs.append(POSITIONS)
        feeds["position_ids"] = np.tile(np.arange(past, past + length), (2, 1))
    if told in ("positions", "mask"):
        inputs.append(MASK)
        feeds["attention_mask"] = np.ones((2, past + length), np.int64)
    inputs.append(PAST)
    feeds["past_key_values.0.key"] = np.zeros((2, 2, past, 4), np.float32)
    want = np.tile(np.arange(past, past + length) < 4, 2)
    np.testing.assert_array_equal(dense_of(TokenPolicy("both", 4), feeds, inputs), want)
    for phase, alone in (("prefill", True), ("decode", False)):
        got = dense_of(TokenPolicy(phase, 4), feeds, inputs)
        np.testing.assert_array_equal(got, want | ((length == 1) == alone))


def test_without_a_cache_positions_start_at_zero() -> None:
    got = dense_of(TokenPolicy("both", 2), {"input_ids": np.zeros((2, 3), np.int64)}, [IDS])
    assert got.tolist() == [True, True, False] * 2


def test_a_mask_counts_from_the_first_real_token() -> None:
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], np.int64)
    got = dense_of(
        TokenPolicy("both", 2), {"input_ids": np.zeros((2, 3), np.int64), "attention_mask": mask}, [IDS, MASK]
    )
    assert got.tolist() == [True, True, False, False, False, False]


def test_embeddings_tell_the_number_of_tokens_too() -> None:
    embeds = ("inputs_embeds", TensorProto.FLOAT, ["b", "s", 8])
    got = dense_of(TokenPolicy("prefill", 1), {"inputs_embeds": np.zeros((1, 3, 8), np.float32)}, [embeds])
    assert got.tolist() == [True, False, False]


@pytest.mark.parametrize(
    "inputs,opset,words",
    [
        ([("x", TensorProto.FLOAT, ["b", 8])], 17, "takes token ids or embeddings"),
        ([IDS, ("past_key_values.0.key", TensorProto.FLOAT, [1, 2, 64, 4])], 17, "export it with position_ids"),
        ([IDS], 10, "opset 10 is too old"),
        ([("input_ids", TensorProto.INT64, ["b", 1])], 17, "fixed length 1, so with phase prefill nothing would ever"),
    ],
    ids=["no tokens", "a fixed cache", "old", "one token"],
)
def test_a_graph_that_does_not_tell_is_refused(inputs: list[tuple], opset: int, words: str) -> None:
    graph = helper.make_graph([], "g", [helper.make_tensor_value_info(*i) for i in inputs], [])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    with pytest.raises(UsageError, match=words):
        TokenPolicy("prefill", 2).nodes(proto)


def test_names_that_are_taken_are_left_alone() -> None:
    graph = helper.make_graph([], "g", [helper.make_tensor_value_info(*IDS)], [])
    graph.initializer.append(numpy_helper.from_array(np.zeros(1), "nmonnx/dense"))
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    assert TokenPolicy("prefill").nodes(proto)[-1].output[0] == "nmonnx/dense_"


@pytest.mark.parametrize("library", [True, False], ids=["library", "fallback"])
@pytest.mark.parametrize("kernel", ["fused", "prune"])
@pytest.mark.parametrize("phase", ["both", "prefill", "decode"])
@pytest.mark.parametrize("prefix", [0, 3])
def test_a_decoder_prunes_exactly_the_other_tokens(
    tmp_path: Path, prefix: int, phase: str, kernel: str, library: bool
) -> None:
    """Against numpy, token by token: its logits are the sum of the embeddings so far times the head."""
    source = toy_decoders.split_cache(tmp_path / "in.onnx", NAMES)
    recipe = Recipe(Pattern(2, 4), lm_head=True, kernel=kernel, phase=phase, dense_prefix=prefix)
    convert(source, tmp_path / "out.onnx", recipe)
    session = make_session(tmp_path / "out.onnx", library=library)
    tokens = np.random.default_rng(0).integers(0, toy_decoders.VOCAB, (2, 8))
    sums = np.cumsum(toy_decoders.EMBED[tokens], axis=1)
    past, at = np.zeros((2, 1, 0, 4), np.float32), 0
    for length in (2, 1, 1, 4):
        now = slice(at, at + length)
        dense = np.arange(at, at + length) < prefix
        dense |= (length == 1) if phase == "prefill" else (length > 1) if phase == "decode" else False
        want = reference.prune(sums[:, now], 2, 4, dense=np.tile(dense, 2)) @ toy_decoders.HEAD
        feeds = {"input_ids": tokens[:, now], "past_k_0": -past, "past_v_0": past}
        logits, _, past = session.run(["logits", "new_k_0", "new_v_0"], feeds)
        np.testing.assert_allclose(logits, want, atol=1e-5)
        at += length


@pytest.fixture(scope="module", params=[True, False], ids=["positions", "mask"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a cache; heads of 24 channels are rotated by position ids, others by the attention mask."""
    folder = tmp_path_factory.mktemp("tiny")
    config = CONFIG | ({"head_dim": 24} if request.param else {})
    write_folder(folder / "hf", config, llama_weights(config))
    path = build(folder / "hf", folder / "out")
    names = [i.name for i in onnx.load(path, load_external_data=False).graph.input]
    assert ("position_ids" in names) == request.param
    return path


@pytest.mark.parametrize("kernel", ["fused", "prune"])
@pytest.mark.parametrize("mitigation", [(), ("var",), ("d-pts",)], ids=str)
def test_with_phase_prefill_a_step_is_that_of_the_dense_model_on_the_same_cache(
    tiny: Path, tmp_path: Path, kernel: str, mitigation: tuple[str, ...]
) -> None:
    recipe = Recipe(Pattern(2, 4), kernel=kernel, phase="prefill", mitigations=mitigation)
    done = convert(tiny, tmp_path / "out.onnx", recipe)
    sparse, dense = make_session(done.out), make_session(tiny)
    ids = np.random.default_rng(0).integers(3, 500, (1, 7))
    prompt, cache = call(sparse, ids[:, :6], {})
    assert np.abs(prompt - call(dense, ids[:, :6], {})[0]).max() > 1e-2
    for session in (sparse, dense):
        assert not np.array_equal(prompt[:, -1:], call(session, ids[:, 6:], cache)[0])
    np.testing.assert_allclose(call(sparse, ids[:, 6:], cache)[0], call(dense, ids[:, 6:], cache)[0], atol=1e-4)


@pytest.mark.parametrize("recipe", [{"dense_prefix": 64}, {"phase": "decode"}], ids=str)
def test_where_all_tokens_stay_dense_the_logits_are_those_of_the_original(
    tiny: Path, tmp_path: Path, recipe: dict
) -> None:
    done = convert(tiny, tmp_path / "out.onnx", Recipe(Pattern(2, 4), kernel="fused", mitigations=("var",), **recipe))
    ids = np.random.default_rng(1).integers(3, 500, (2, 12))
    want = Decoder(tiny, threads=1).score(ids)
    np.testing.assert_allclose(Decoder(done.out, threads=1).score(ids), want, atol=1e-4)


def test_a_prefix_changes_nothing_in_the_tokens_behind_it_but_through_the_cache(tiny: Path, tmp_path: Path) -> None:
    done = convert(tiny, tmp_path / "out.onnx", Recipe(Pattern(2, 4), dense_prefix=4, kernel="fused"))
    ids = np.random.default_rng(1).integers(3, 500, (2, 9))
    got, want = (Decoder(path, threads=1).score(ids) for path in (done.out, tiny))
    np.testing.assert_allclose(got[:, :4], want[:, :4], atol=1e-4)
    assert np.abs(got[:, 4:] - want[:, 4:]).max() > 1e-2


def test_what_a_prefix_does_does_not_depend_on_how_a_text_is_cut_into_calls(tiny: Path, tmp_path: Path) -> None:
    done = convert(tiny, tmp_path / "out.onnx", Recipe(Pattern(2, 4), dense_prefix=4, kernel="fused"))
    ids = np.random.default_rng(1).integers(3, 500, (2, 9))
    decoder = Decoder(done.out, threads=1)
    for prompt in (1, 3, 6):
        steps = [decoder.prefill(ids[:, :prompt]), *(decoder.step(ids[:, i]) for i in range(prompt, 9))]
        np.testing.assert_allclose(np.stack(steps, axis=1), decoder.score(ids)[:, prompt - 1 :], atol=1e-4)


@pytest.mark.parametrize("recipe", [{"phase": "prefill"}, {"phase": "decode", "dense_prefix": 3}], ids=str)
@pytest.mark.parametrize("kernel", ["fused", "prune"])
def test_validation_accepts_it_and_sees_a_node_that_says_something_else(
    tiny: Path, tmp_path: Path, kernel: str, recipe: dict
) -> None:
    out = tmp_path / "out.onnx"
    convert(tiny, out, Recipe(Pattern(2, 4), kernel=kernel, **recipe))
    report = validate(tiny, out, threads=1)
    assert [c for c in report.checks if not c.passed] == []
    assert "pruned layers know which tokens stay dense" in {c.name for c in report.checks}
    proto = onnx.load(out)
    single = next(n for n in proto.graph.node if n.name == "nmonnx/dense/single")
    single.op_type = "Less"
    onnx.save(proto, out)
    failed = {c.name for c in validate(tiny, out, threads=1).checks if not c.passed}
    assert {"pruned layers know which tokens stay dense", "other nodes are unchanged"} <= failed


def test_the_original_stays_as_it_is_without_a_policy(tiny: Path, tmp_path: Path) -> None:
    done = convert(tiny, tmp_path / "out.onnx", Recipe(Pattern(2, 4)))
    assert not any("nmonnx/dense" in n.name for n in onnx.load(done.out).graph.node)


def in_a_function() -> onnx.ModelProto:
    """One layer of the main graph and one of a function, on embeddings."""
    proto = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[b,s,8] inputs_embeds) => (float[b,s,8] y) { h = MatMul(inputs_embeds, w1)  y = local.layer(h) }
        <domain: "local", opset_import: ["" : 17]>
        layer (x) => (y) { w = Constant<value = float[8,8] {WEIGHT}> ()  y = MatMul(x, w) }
        """.replace("WEIGHT", ", ".join("1" for _ in range(64)))
    )
    proto.graph.initializer.append(numpy_helper.from_array(weights(8, 8), "w1"))
    return proto


@pytest.mark.parametrize("recipe", [{"phase": "prefill"}, {"dense_prefix": 2}], ids=str)
def test_a_layer_in_a_function_prunes_every_token_and_says_so(tmp_path: Path, recipe: dict) -> None:
    source = write(in_a_function(), tmp_path / "in.onnx")
    done = convert(source, tmp_path / "out.onnx", Recipe(Pattern(2, 4), kernel="prune", **recipe))
    (reason,) = next(p for p in done.passes if p.name == "dense-tokens").left.values()
    assert reason == "it lies in a function, which does not see the inputs of the graph: every token is pruned"
    x = np.random.default_rng(0).standard_normal((1, 3, 8)).astype(np.float32)
    dense = np.arange(3) < recipe.get("dense_prefix", 0)
    hidden = reference.prune(x, 2, 4, dense=dense) @ weights(8, 8)
    want = reference.prune(hidden, 2, 4) @ np.ones((8, 8), np.float32)
    for library in (True, False):
        got = make_session(tmp_path / "out.onnx", library=library).run(None, {"inputs_embeds": x})[0]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert all(c.passed for c in validate(source, done.out, threads=1).checks)


def test_layers_in_branches_see_which_tokens_stay_dense(tmp_path: Path) -> None:
    proto = model(
        """
        g (float[b,s,8] inputs_embeds, bool c) => (float[b,s,8] y) {
          y = If(c) <then_branch = yes () => (float[b,s,8] p) { p = MatMul(inputs_embeds, w1) },
                     else_branch = no () => (float[b,s,8] q) { q = MatMul(inputs_embeds, w2) }>
        }
        """,
        w1=weights(8, 8),
        w2=weights(8, 8, seed=1),
    )
    source = write(proto, tmp_path / "in.onnx")
    done = convert(source, tmp_path / "out.onnx", Recipe(Pattern(2, 4), kernel="fused", dense_prefix=2))
    assert next(p for p in done.passes if p.name == "dense-tokens").left == {}
    x = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    for library in (True, False):
        session = make_session(done.out, library=library)
        for branch, seed in ((True, 0), (False, 1)):
            want = reference.prune(x, 2, 4, dense=np.tile([True, True, False], 2)) @ weights(8, 8, seed=seed)
            got = session.run(None, {"inputs_embeds": x, "c": np.array(branch)})[0]
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "picks",
    ["t = NonZero(route) i = Gather<axis = 0>(t, one)", "i = Constant<value_ints = [-1]>()"],
    ids=["routed", "head"],
)
def test_layers_that_see_only_some_tokens_prune_all_of_them(tmp_path: Path, picks: str) -> None:
    is_head = "NonZero" not in picks
    proto = model(
        f"""
        g (float[b,s,8] inputs_embeds, bool[b,s] route) => (float[b,n,8] logits) {{
          one = Constant<value_int = 1>()
          h = MatMul(inputs_embeds, w1)
          {picks}
          x = Gather<axis = 1>(h, i)
          logits = MatMul(x, w2)
        }}
        """,
        w1=weights(8, 8),
        w2=weights(8, 8, seed=1),
    )
    source = write(proto, tmp_path / "in.onnx")
    rows = TokenRows(proto.graph)
    assert TokenPolicy("both", 2).refusal(rows, "", "x", "lm_head" if is_head else "up") != ""
    assert TokenPolicy("both", 2).refusal(rows, "", "inputs_embeds", "lm_head" if is_head else "up") == ""
    assert TokenPolicy("prefill").refusal(rows, "", "x", "up") == ""
    assert TokenPolicy("both", 2).refusal(rows, "loop.body", "h", "up") != ""
    if is_head:
        return
    done = convert(source, tmp_path / "out.onnx", Recipe(Pattern(2, 4), kernel="fused", dense_prefix=2))
    (reason,) = next(p for p in done.passes if p.name == "dense-tokens").left.values()
    assert reason == "its activation holds only some tokens of the call: every one of them is pruned"
    x = np.random.default_rng(0).standard_normal((1, 4, 8)).astype(np.float32)
    hidden = reference.prune(x, 2, 4, dense=np.arange(4) < 2) @ weights(8, 8)
    want = reference.prune(hidden[:, [1, 3]], 2, 4) @ weights(8, 8, seed=1)
    feeds = {"inputs_embeds": x, "route": np.array([[False, True, False, True]])}
    np.testing.assert_allclose(make_session(done.out).run(None, feeds)[0], want, rtol=1e-4, atol=1e-4)


def test_a_model_without_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="phase and dense_prefix need a graph that takes token ids"):
        convert(write(mlp(), tmp_path / "in.onnx"), tmp_path / "out.onnx", Recipe(Pattern(2, 4), phase="decode"))
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    "given,words",
    [({"phase": "train"}, "phase 'train' is not one of"), ({"dense_prefix": -1}, "negative")],
    ids=["phase", "prefix"],
)
def test_a_recipe_that_makes_no_sense_is_refused(given: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Recipe(**given)
    with pytest.raises(UsageError, match="dense_prefix must be a whole number"):
        Recipe.from_dict({"dense_prefix": "4"})


def call(session, ids: np.ndarray, cache: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits of a call and the cache behind it."""
    pasts = [i for i in session.get_inputs() if i.name.startswith("past")]
    kept = cache or {i.name: np.zeros((len(ids), i.shape[1], 0, i.shape[3]), np.float32) for i in pasts}
    before = next(iter(kept.values())).shape[2]
    feeds = {"input_ids": ids, "attention_mask": np.ones((len(ids), before + ids.shape[1]), np.int64), **kept}
    if any(i.name == "position_ids" for i in session.get_inputs()):
        feeds["position_ids"] = np.tile(np.arange(before, before + ids.shape[1]), (len(ids), 1))
    logits, *present = session.run(None, feeds)
    names = [o.name.replace("present", "past_key_values") for o in session.get_outputs()[1:]]
    return logits, dict(zip(names, present, strict=True))


@pytest.mark.parametrize("told,length", [(True, 3), (False, 1)], ids=["those of the call", "one"])
def test_a_recorded_shape_tells_whether_an_activation_holds_the_tokens(told: bool, length: int) -> None:
    proto = model(f"g (float[2,3,8] inputs_embeds, float[2,{length},8] h) => (float[2,{length},8] y) {{ y = Relu(h) }}")
    assert (TokenPolicy("both", 2).refusal(TokenRows(proto.graph), "", "h", "up") == "") == told


def test_the_report_says_which_tokens_stay_dense(tmp_path: Path) -> None:
    source = write(in_a_function(), tmp_path / "in.onnx")
    done = convert(source, None, Recipe(Pattern(2, 4), phase="decode", dense_prefix=4))
    words = conversion(done).words
    assert "Pruned in decode only: calls with one token in a row." in words
    assert "Dense: the tokens at the first 4 positions." in words
    assert any(line.startswith("In 1 layer: it lies in a function") for line in words)

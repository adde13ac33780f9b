"""Validation measures what it says, proves what it says, and catches a conversion that was tampered with."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, helper, numpy_helper
from small_models import model, weights, write

from nmonnx.convert import convert
from nmonnx.errors import InputError, RunError, UsageError
from nmonnx.feeds import Feed
from nmonnx.onnx_file.skeleton import _data_root
from nmonnx.pattern import Pattern
from nmonnx.pruning.recipe import Recipe
from nmonnx.reference import prune
from nmonnx.validate import Language, Report, Thresholds, validate

Pairs = dict[str, tuple[Path, Path]]

VOCAB, HIDDEN, INNER = 24, 32, 48
PRUNED = "each pruned layer has one op of its pattern"
LEFT = "layers that were left see no pruned value"
OPS = "each op serves the layers it lists"
PORTS = "inputs and outputs are unchanged"
WEIGHTS = "weights are unchanged"
DECLARED = "declared changes of weights are what they say"
NODES = "other nodes are unchanged"
AROUND = "the model around the graph is unchanged"
RECORDED = "every linear layer is recorded"
EXACT = "pruned activations equal the reference bit for bit"
GROUPS = "every group keeps exactly N of its non-zero values"
FUSED = "fused layers equal the reference up to rounding"
RUNS = "the converted model runs"


def language_model() -> ModelProto:
    """q and k on one activation, o with its weight stored transposed and a bias, a head that stays dense."""
    proto = model(
        f"""lm (int64[b, t] input_ids) => (float[b, t, {VOCAB}] logits) {{
            x = Gather(embed, input_ids)
            q = MatMul(x, q_proj)
            k = MatMul(x, k_proj)
            a = Mul(q, k)
            s = Tanh(a)
            o_proj = Transpose <perm = [1, 0]> (o_stored)
            o = MatMul(s, o_proj)
            ob = Add(o, bias)
            h = Add(x, ob)
            logits = MatMul(h, lm_head)
        }}""",
        embed=weights(VOCAB, HIDDEN, seed=1),
        q_proj=weights(HIDDEN, INNER, seed=2) / 8,
        k_proj=weights(HIDDEN, INNER, seed=3) / 8,
        o_stored=weights(HIDDEN, INNER, seed=4) / 8,
        bias=weights(HIDDEN, seed=5),
        lm_head=weights(HIDDEN, VOCAB, seed=6),
    )
    for node in proto.graph.node:
        node.name = f"{node.output[0]}/{node.op_type}"
    proto.metadata_props.add(key="author", value="somebody")
    return proto


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Pairs:
    """The language model and its conversion, by kernel."""
    made = {}
    for kernel in ("prune", "fused"):
        folder = tmp_path_factory.mktemp(kernel)
        original = write(language_model(), folder / "m.onnx")
        convert(original, folder / "c.onnx", Recipe(Pattern(2, 4), kernel=kernel))
        made[kernel] = original, folder / "c.onnx"
    return made


def failed(report: Report) -> list[str]:
    return [check.name for check in report.checks if not check.passed]


def check(report: Report, name: str):
    return next(c for c in report.checks if c.name == name)


def tampered(pair: tuple[Path, Path], tmp_path: Path, change: Callable[[ModelProto], object]) -> Report:
    original, converted = pair
    proto = onnx.load(converted)
    change(proto)
    return validate(original, write(proto, tmp_path / "t.onnx"), language=Language(new_tokens=0))


def node_making(proto: ModelProto, output: str) -> onnx.NodeProto:
    return next(n for n in proto.graph.node if output in n.output)


def ops(proto: ModelProto) -> list[onnx.NodeProto]:
    return [n for n in proto.graph.node if n.domain == "ai.nmonnx"]


def tensor(proto: ModelProto, name: str) -> onnx.TensorProto:
    return next(t for t in proto.graph.initializer if t.name == name)


def flip(stored: onnx.TensorProto) -> None:
    raw = bytearray(stored.raw_data)
    raw[3] ^= 0x80  # the sign of the first value
    stored.raw_data = bytes(raw)


def set_attribute(node: onnx.NodeProto, name: str, value: int) -> None:
    next(a for a in node.attribute if a.name == name).i = value


def set_metadata(proto, key: str, value: str) -> None:
    next(p for p in proto.metadata_props if p.key == key).value = value


def edit_records(proto: ModelProto, change: Callable[[list[dict]], object]) -> None:
    records = json.loads(next(p.value for p in proto.metadata_props if p.key == "nmonnx.sites"))
    change(records)
    set_metadata(proto, "nmonnx.sites", json.dumps(records))


@pytest.mark.parametrize("kernel", ["prune", "fused"])
def test_an_honest_conversion_passes_every_check(pairs: Pairs, kernel):
    report = validate(*pairs[kernel])
    assert report.passed, failed(report)
    names = [c.name for c in report.checks]
    assert {PRUNED, LEFT, OPS, PORTS, WEIGHTS, DECLARED, NODES, AROUND, RECORDED, EXACT, GROUPS, FUSED} <= set(names)
    assert check(report, WEIGHTS).value == 6 and check(report, RECORDED).value == 4
    assert check(report, EXACT).value == (3 if kernel == "prune" else 0)
    assert check(report, FUSED).value == (0 if kernel == "prune" else 3)
    assert check(report, DECLARED).value == (0 if kernel == "prune" else 1)


def rewire(proto: ModelProto, output: str, slot: int, name: str) -> None:
    node_making(proto, output).input[slot] = name


def prune_twice(proto: ModelProto) -> None:
    first = node_making(proto, "x/pruned")
    second = onnx.NodeProto()
    second.CopyFrom(first)
    second.name, second.input[0], second.output[0] = "again", "x/pruned", "x/pruned2"
    proto.graph.node.insert(list(proto.graph.node).index(first) + 1, second)
    rewire(proto, "q", 0, "x/pruned2")


def prune_the_activation_itself(proto: ModelProto) -> None:
    """x is pruned under its own name: every reader, the residual too, sees pruned values."""
    prune_node = onnx.NodeProto()
    prune_node.CopyFrom(node_making(proto, "x/pruned"))
    node_making(proto, "x").output[0] = "x_dense"
    prune_node.name, prune_node.input[0], prune_node.output[0] = "again", "x_dense", "x"
    proto.graph.node.insert(1, prune_node)


def add_op(proto: ModelProto) -> None:
    stray = helper.make_node("NMPrune", ["a"], ["a/pruned"], "stray", domain="ai.nmonnx", keep=2, group=4)
    proto.graph.node.insert(5, stray)
    rewire(proto, "s", 0, "a/pruned")


def rename_output(proto: ModelProto) -> None:
    rewire_output = node_making(proto, "logits")
    rewire_output.output[0] = proto.graph.output[0].name = "logits2"
    edit_records(proto, lambda records: [r.update(output="logits2") for r in records if r["output"] == "logits"])


def copy_weight_changed(proto: ModelProto) -> None:
    """The layer reads a changed copy; the weight itself is still there."""
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor(proto, "q_proj"))
    copy.name = "q_proj_2"
    flip(copy)
    proto.graph.initializer.append(copy)
    rewire(proto, "q", 1, "q_proj_2")


def swap_weights(proto: ModelProto) -> None:
    q, k = node_making(proto, "q"), node_making(proto, "k")
    q.input[1], k.input[1] = k.input[1], q.input[1]


def repacked(proto: ModelProto) -> str:
    return node_making(proto, "o").input[1]


def drop_metadata(proto: ModelProto) -> None:
    kept = [p for p in proto.metadata_props if p.key != "author"]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)


def give_bias(proto: ModelProto) -> None:
    proto.graph.initializer.append(numpy_helper.from_array(np.full(INNER, 1e-3, np.float32), "extra"))
    del proto.functions[:]
    node_making(proto, "q").input.append("extra")


TAMPERED = {
    "a weight bit flipped": ("prune", lambda m: flip(tensor(m, "k_proj")), {WEIGHTS}),
    "a weight bit flipped beside fused layers": ("fused", lambda m: flip(tensor(m, "q_proj")), {WEIGHTS, FUSED}),
    "an embedding bit flipped": ("fused", lambda m: flip(tensor(m, "embed")), {WEIGHTS}),
    "a changed copy of a weight": ("prune", copy_weight_changed, {WEIGHTS, NODES, PRUNED}),
    "weights of two layers swapped": ("fused", swap_weights, {PRUNED, FUSED}),
    "a repacked weight's bit flipped": ("fused", lambda m: flip(tensor(m, repacked(m))), {DECLARED, FUSED}),
    "a repacked weight not declared": (
        "fused",
        lambda m: set_metadata(m, "nmonnx.changed", "{}"),
        {PRUNED, WEIGHTS},
    ),
    "a repacked weight declared as something else": (
        "fused",
        lambda m: set_metadata(m, "nmonnx.changed", json.dumps({repacked(m): {"from": "o_stored", "how": "scaled"}})),
        {DECLARED},
    ),
    "a prune missing": ("prune", lambda m: rewire(m, "q", 0, "x"), {PRUNED, OPS}),
    "a prune of the wrong pattern": (
        "prune",
        lambda m: set_attribute(node_making(m, "x/pruned"), "keep", 1),
        {PRUNED, EXACT, GROUPS},
    ),
    "a fused op of the wrong pattern": (
        "fused",
        lambda m: set_attribute(node_making(m, "q"), "keep", 3),
        {PRUNED, FUSED},
    ),
    "another pattern than the recipe": (
        "prune",
        lambda m: edit_records(m, lambda records: [r.update(pattern="1:4") for r in records if "pattern" in r]),
        {PRUNED, EXACT, GROUPS},
    ),
    "a doubled prune": ("prune", prune_twice, {PRUNED, OPS}),
    "an activation pruned under its own name": ("prune", prune_the_activation_itself, {PRUNED, OPS, NODES}),
    "an op that belongs to no layer": ("prune", add_op, {OPS, NODES}),
    "an op that lists another layer": (
        "fused",
        lambda m: set_metadata(node_making(m, "q"), "nmonnx.site", '["k/MatMul"]'),
        {PRUNED, OPS},
    ),
    "a left layer fed with pruned values": ("prune", lambda m: rewire(m, "logits", 0, "x/pruned"), {LEFT, NODES}),
    "the residual fed with pruned values": ("prune", lambda m: rewire(m, "h", 0, "x/pruned"), {NODES}),
    "a layer that is not recorded": ("prune", lambda m: edit_records(m, lambda records: records.pop()), {RECORDED}),
    "a layer recorded with another kernel": (
        "prune",
        lambda m: edit_records(m, lambda records: records[0].update(kernel="NMMatMul")),
        {PRUNED, NODES},
    ),
    "a bias that was not there": ("fused", give_bias, {PRUNED, WEIGHTS}),
    "a renamed output": ("prune", rename_output, {PORTS, NODES}),
    "another activation function": (
        "prune",
        lambda m: setattr(node_making(m, "s"), "op_type", "Sin"),
        {NODES},
    ),
    "an attribute changed": (
        "prune",
        lambda m: node_making(m, "x").attribute.append(helper.make_attribute("axis", 0)),
        {NODES},
    ),
    "metadata lost": ("prune", drop_metadata, {AROUND}),
    "another opset": ("prune", lambda m: setattr(m.opset_import[0], "version", 16), {AROUND}),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_tampering_is_caught_by_the_check_that_is_about_it(case, pairs: Pairs, tmp_path):
    kernel, change, expected = TAMPERED[case]
    report = tampered(pairs[kernel], tmp_path, change)
    structural = {PRUNED, LEFT, OPS, PORTS, WEIGHTS, DECLARED, NODES, AROUND, RECORDED}
    assert set(failed(report)) & structural == expected & structural
    assert expected - structural <= set(failed(report)) or not check(report, RUNS).passed


def test_a_failed_check_names_what_is_wrong(pairs: Pairs, tmp_path):
    report = tampered(pairs["prune"], tmp_path, lambda m: flip(tensor(m, "k_proj")))
    assert check(report, WEIGHTS).detail == "initializer 'k_proj' has other bytes"
    assert (check(report, WEIGHTS).value, check(report, WEIGHTS).limit) == (5, 6)


@pytest.mark.parametrize(("kernel", "name", "broken"), [("prune", "NMPrune", EXACT), ("fused", "NMMatMul", FUSED)])
def test_an_op_that_computes_something_else_is_caught(kernel, name, broken, pairs: Pairs, tmp_path, monkeypatch):
    """The fallback function keeps the smallest values instead; the library, which would not run it, stays out."""
    monkeypatch.setattr("nmonnx.onnx_file.skeleton._register", lambda options: None)

    def keep_smallest(proto):
        body = next(f for f in proto.functions if f.name == name)
        top = next(n for n in body.node if n.op_type == "TopK")
        top.attribute.append(helper.make_attribute("largest", 0))

    report = tampered(pairs[kernel], tmp_path, keep_smallest)
    assert broken in failed(report)


def by_hand(ids: np.ndarray, pattern: Pattern | None) -> dict[str, np.ndarray]:
    """The language model in numpy, float64; with `pattern` q, k and o prune their input."""
    w = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in language_model().graph.initializer}

    def pruned(v):
        return v if pattern is None else prune(v.astype(np.float32), pattern.n, pattern.m).astype(np.float64)

    x = w["embed"][ids]
    q, k = pruned(x) @ w["q_proj"], pruned(x) @ w["k_proj"]
    s = np.tanh(q * k)
    o = pruned(s) @ w["o_stored"].T
    return {"x": x, "q": q, "k": k, "s": s, "o": o, "logits": (x + o + w["bias"]) @ w["lm_head"], **w}


IDS = np.random.default_rng(7).integers(0, VOCAB, (2, 9))


def norm(x) -> float:
    return float(np.linalg.norm(x))


@pytest.mark.parametrize("kernel", ["prune", "fused"])
def test_layers_are_measured_as_defined(kernel, pairs: Pairs):
    report = validate(*pairs[kernel], feeds=[{"input_ids": IDS[:1]}, {"input_ids": IDS[1:]}])
    dense, sparse = by_hand(IDS, None), by_hand(IDS, Pattern(2, 4))
    sites = {s.name: s for s in report.sites}
    for name, activation, weight in (("q/MatMul", "x", "q_proj"), ("o/MatMul", "s", "o_stored")):
        site, x = sites[name], dense[activation]
        kept = prune(x.astype(np.float32), 2, 4).astype(np.float64)
        w = dense[weight] if name[0] == "q" else dense[weight].T
        y, y2 = dense[name[0]], sparse[name[0]]
        assert site.tokens == 18 and site.density == 0.5
        assert site.kept_energy == pytest.approx((kept**2).sum() / (x**2).sum(), rel=1e-4)
        assert site.error == pytest.approx(norm((x - kept) @ w) / norm(x @ w), rel=1e-4)
        assert site.error_propagated == pytest.approx(norm(y2 - y) / norm(y), rel=1e-4)
    assert sites["q/MatMul"].error == pytest.approx(sites["q/MatMul"].error_propagated, rel=1e-4)
    assert norm(sites["o/MatMul"].error) < norm(sites["o/MatMul"].error_propagated)
    head = sites["logits/MatMul"]
    assert (head.status, head.tokens, head.kept_energy) == ("left", 0, None) and head.reason
    lowest = check(report, "kept energy of a layer's input")
    assert lowest.value == min(s.kept_energy for s in report.sites if s.kept_energy)


def test_logits_are_measured_as_defined(pairs: Pairs):
    report = validate(*pairs["prune"], feeds=[Feed("mine", {"input_ids": IDS})])
    a, b = by_hand(IDS, None)["logits"], by_hand(IDS, Pattern(2, 4))["logits"]
    (output,) = report.outputs
    assert output.logits is not None
    assert report.feeds == ("mine",) and output.name == "logits" and output.logits.positions == 18
    assert output.closeness.max_abs == pytest.approx(np.abs(a - b).max(), rel=1e-4)
    assert check(report, "logits: relative").value == pytest.approx(norm(a - b) / norm(a), rel=1e-4)
    assert check(report, "logits: top1").value == (a.argmax(-1) == b.argmax(-1)).mean()
    p, q = (np.exp(v) / np.exp(v).sum(-1, keepdims=True) for v in (a, b))
    assert check(report, "logits: kl").value == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-3)


def test_keeping_every_channel_measures_no_difference(tmp_path):
    original = write(language_model(), tmp_path / "m.onnx")
    convert(original, tmp_path / "c.onnx", Recipe(Pattern(4, 4)))
    report = validate(original, tmp_path / "c.onnx")
    assert report.passed and report.language.greedy == 1
    assert check(report, "logits: max_abs").value == 0 and check(report, "logits: snr_db").value == math.inf
    assert {(s.kept_energy, s.error, s.error_propagated) for s in report.sites if s.tokens} == {(1, 0, 0)}


def test_greedy_continuations_are_compared_up_to_the_first_difference(pairs: Pairs):
    report = validate(*pairs["prune"], language=Language(new_tokens=8), seed=3)
    prompts = np.random.default_rng(3).integers(0, VOCAB, (4, 16))
    shares = []
    for prompt in prompts:
        written: list[list[int]] = []
        for pattern in (None, Pattern(2, 4)):
            tokens = list(prompt)
            for _ in range(8):
                tokens.append(int(by_hand(np.array([tokens]), pattern)["logits"][0, -1].argmax()))
            written.append(tokens[16:])
        equal = [a == b for a, b in zip(*written, strict=True)]
        shares.append([*equal, False].index(False) / 8)
    assert report.language.greedy == pytest.approx(np.mean(shares))
    assert (report.language.prompts, report.language.new_tokens) == (4, 8)


def test_perplexity_of_a_text_is_that_of_both_models(pairs: Pairs):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    ids = np.random.default_rng(1).integers(0, VOCAB, 64)
    text = " ".join(f"w{i}" for i in ids)
    report = validate(*pairs["prune"], language=Language(tokenizer, text, window=16))
    ppl = []
    for pattern in (None, Pattern(2, 4)):
        logits = by_hand(ids.reshape(4, 16), pattern)["logits"][:, :-1]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        chosen = np.take_along_axis(log_p, ids.reshape(4, 16)[:, 1:, None], axis=-1)
        ppl.append(math.exp(-chosen.mean()))
    assert report.feeds == ("text 0", "text 1", "text 2", "text 3")
    dense, sparse = by_hand(ids[None], None)["logits"], by_hand(ids[None], Pattern(2, 4))["logits"]
    assert check(report, "logits: mean_abs").value == pytest.approx(np.abs(dense - sparse).mean(), rel=1e-4)
    language = report.language
    assert (language.ppl_original, language.ppl_converted) == pytest.approx(ppl, rel=1e-4)
    assert check(report, "perplexity ratio").value == pytest.approx(ppl[1] / ppl[0], rel=1e-4)
    assert norm(language.ppl_error) > 0 and "4 windows of 16 tokens" in language.protocol


def test_limits_fail_when_exceeded_and_pass_when_met(pairs: Pairs):
    feeds = [{"input_ids": IDS}]
    strict = Thresholds(max_abs=1e-9, snr_db=90, cosine=0.999999, kl=1e-9, top1=1, top5=1, kept_energy=0.9999)
    report = validate(*pairs["prune"], feeds=feeds, thresholds=strict, language=Language(new_tokens=0))
    limits = {"max_abs", "snr_db", "cosine", "kl", "top1", "top5"}
    assert not report.passed
    assert set(failed(report)) == {f"logits: {m}" for m in limits} | {"kept energy of a layer's input"}
    loose = Thresholds(max_abs=1e9, snr_db=-90, cosine=-1, kl=1e9, top1=0, top5=0, kept_energy=0, greedy=0)
    assert validate(*pairs["prune"], feeds=feeds, thresholds=loose).passed


def test_a_limit_on_something_that_was_not_measured_fails(pairs: Pairs):
    report = validate(*pairs["prune"], thresholds=Thresholds(ppl_ratio=2), language=Language(new_tokens=0))
    assert failed(report) == ["perplexity ratio"]
    assert "a tokenizer and a text" in check(report, "perplexity ratio").detail


def test_without_logits_every_floating_point_output_is_held_to_the_limits(tmp_path):
    proto = model(
        """two (float[t, 8] x) => (float[t, 8] y, int64[t] best) {
            y = MatMul(x, w)
            best = ArgMax <axis = 1, keepdims = 0> (y)
        }""",
        w=weights(8, 8),
    )
    original = write(proto, tmp_path / "m.onnx")
    convert(original, tmp_path / "c.onnx", Recipe(Pattern(1, 4)))
    report = validate(original, tmp_path / "c.onnx", thresholds=Thresholds(max_abs=1e-6))
    assert failed(report) == ["y: max_abs"]
    assert 0 <= check(report, "best: equal").value < 1
    assert all(o.logits is None for o in report.outputs)
    assert report.skipped[0][0] == "language" and "takes no token ids" in report.skipped[0][1]


def test_nan_that_the_original_does_not_have_fails_and_nan_that_it_has_does_not(tmp_path):
    """Dropping channels can turn the logarithm of a positive sum into that of a negative one."""
    proto = model(
        "log (float[t, 4] x) => (float[t, 1] y) { s = MatMul(x, w) y = Log(s) }",
        w=np.array([[-1], [1], [1], [1]], np.float32),
    )
    original = write(proto, tmp_path / "m.onnx")
    convert(original, tmp_path / "c.onnx", Recipe(Pattern(1, 4)))
    name = "NaN and Inf are only where the original has them"
    same = {"x": np.array([[np.nan, 1, 1, 1], [-3, 1, 1, 1], [3, -1, 0, 0]], np.float32)}
    assert check(validate(original, tmp_path / "c.onnx", feeds=[same]), name).passed
    lost = {"x": np.array([[2, 1.5, 1.5, 1.5]], np.float32)}
    report = validate(original, tmp_path / "c.onnx", feeds=[lost])
    assert not check(report, name).passed and check(report, FUSED).passed and check(report, EXACT).passed


def test_a_feed_without_tokens_is_legal(tmp_path):
    proto = model("one (float[t, 8] x) => (float[t, 8] y) { y = MatMul(x, w) }", w=weights(8, 8))
    original = write(proto, tmp_path / "m.onnx")
    convert(original, tmp_path / "c.onnx", Recipe(Pattern(2, 4)))
    report = validate(original, tmp_path / "c.onnx", feeds=[{"x": np.zeros((0, 8), np.float32)}])
    assert report.passed and report.sites[0].kept_energy is None


@pytest.mark.parametrize("layout", ["same folder", "other folder", "links"])
def test_external_data_is_found_wherever_it_lies_and_no_file_is_made(layout, tmp_path):
    """As a Hugging Face cache: snapshots/ links into blobs/."""
    blobs, out = tmp_path / "blobs", tmp_path / "out"
    blobs.mkdir(), out.mkdir()
    original = write(language_model(), blobs / "m.onnx", external=True)
    if layout == "links":
        snapshot = tmp_path / "snapshot"
        snapshot.mkdir()
        for file in ("m.onnx", "m.onnx.data"):
            os.rename(blobs / file, blobs / f"hash-of-{file}")
            os.symlink(f"../blobs/hash-of-{file}", snapshot / file)
        original = snapshot / "m.onnx"
    converted = (blobs if layout == "same folder" else out) / "c.onnx"
    convert(original, converted, Recipe(Pattern(2, 4), kernel="fused"))
    before = sorted(tmp_path.rglob("*"))
    report = validate(original, converted)
    assert report.passed and all(s.tokens for s in report.sites if s.status == "pruned")
    assert sorted(tmp_path.rglob("*")) == before


def test_older_onnxruntime_takes_data_locations_from_the_current_folder():
    assert _data_root("1.20.1") == Path.cwd() and _data_root("1.21.0") == Path("/") == _data_root("1.32.0")


def test_files_that_are_no_pair_are_refused_with_what_to_do(pairs: Pairs, tmp_path):
    original, converted = pairs["prune"]
    with pytest.raises(InputError, match="not a converted model; the two files are swapped"):
        validate(converted, original)
    with pytest.raises(InputError, match="not a converted model; convert it with nmonnx first"):
        validate(original, original)
    with pytest.raises(InputError, match="itself a converted model"):
        validate(converted, pairs["fused"][1])
    other = language_model()
    other.producer_name = "another export"
    with pytest.raises(InputError, match=r"was made from a model with SHA-256 .* give the file that was converted"):
        validate(write(other, tmp_path / "o.onnx"), converted)


@pytest.mark.parametrize("key", ["nmonnx.recipe", "nmonnx.sites", "nmonnx.changed"])
@pytest.mark.parametrize("value", ["{", "[1]", '{"a": 1}', "3"])
def test_unreadable_metadata_is_one_sentence(key, value, pairs: Pairs, tmp_path):
    with pytest.raises(InputError, match="metadata cannot be read"):
        tampered(pairs["prune"], tmp_path, lambda m: set_metadata(m, key, value))


def test_a_text_without_a_tokenizer_is_refused():
    with pytest.raises(UsageError, match="without a tokenizer"):
        Language(text="words")


def test_feeds_that_the_original_cannot_run_are_refused_by_name(pairs: Pairs):
    with pytest.raises(RunError, match="failed on feed 'feed 0'"):
        validate(*pairs["prune"], feeds=[{"input_ids": np.array([[VOCAB + 5]])}])


def test_a_converted_model_that_does_not_run_is_a_failed_check(pairs: Pairs, tmp_path):
    def drop_kernels(proto):
        del proto.functions[:]
        for node in ops(proto):
            node.op_type = "NMUnknown"

    report = tampered(pairs["prune"], tmp_path, drop_kernels)
    assert RUNS in failed(report) and check(report, RUNS).detail


def test_a_pair_that_nothing_can_run_is_still_compared_and_says_so(tmp_path):
    proto = language_model()
    node_making(proto, "s").domain = "com.nobody"
    proto.opset_import.append(helper.make_opsetid("com.nobody", 1))
    original = write(proto, tmp_path / "m.onnx")
    convert(original, tmp_path / "c.onnx", Recipe(Pattern(2, 4)))
    report = validate(original, tmp_path / "c.onnx")
    assert report.passed and check(report, PRUNED).value >= 2
    assert [what for what, _ in report.skipped] == ["running"] and not report.outputs
    assert [s.status for s in report.sites].count("pruned") == check(report, PRUNED).value


def test_the_json_report_has_versions_digests_checks_and_a_record_for_every_layer(pairs: Pairs):
    original, converted = pairs["fused"]
    report = validate(original, converted, feeds=[{"input_ids": np.zeros((1, 0), np.int64)}])
    document = json.loads(report.to_json(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert any(c["value"] == "inf" for c in document["checks"])
    assert document["schema_version"] == 1
    assert document["versions"]["onnxruntime"] == ort.__version__
    assert [Path(i["path"]) for i in document["inputs"]] == [original, converted]
    assert all(len(i["sha256"]) == 64 for i in document["inputs"])
    assert document["passed"] and document["recipe"]["pattern"] == "2:4"
    assert {s["name"]: s["status"] for s in document["sites"]} == {
        "q/MatMul": "pruned",
        "k/MatMul": "pruned",
        "o/MatMul": "pruned",
        "logits/MatMul": "left",
    }


def test_rows_are_text_and_mark_failures(pairs: Pairs, tmp_path):
    report = tampered(pairs["prune"], tmp_path, lambda m: flip(tensor(m, "k_proj")))
    rows = {row[0]: row for row in report.rows()}
    assert rows[WEIGHTS][1:4] == ("5", "6", "FAIL") and rows[PORTS][3] == "pass" and rows["logits: kl"][2:4] == ("", "")
    assert all(isinstance(cell, str) for row in [*report.rows(), *report.site_rows()] for cell in row)
    assert len({len(row) for row in report.site_rows()}) == 1


def test_a_run_can_be_repeated(pairs: Pairs):
    first, second = (validate(*pairs["fused"], seed=5).data() for _ in range(2))
    assert first == second


@pytest.mark.parametrize("kernel", ["prune", "fused"])
@pytest.mark.parametrize(
    "name",
    ["llama-genai-fp32", "llama-optimum-fp16", "llama-optimum-merged", "llama-ortq-dynint8", "llama-synth-functions"],
)
def test_conversions_of_exports_pass(name, kernel, zoo, tmp_path):
    original = zoo(name)
    convert(original, tmp_path / "c.onnx", Recipe(Pattern(2, 4), kernel=kernel))
    report = validate(original, tmp_path / "c.onnx", language=Language(new_tokens=4))
    assert report.passed, failed(report)
    assert all(s.tokens or s.note for s in report.sites if s.status == "pruned")


def test_a_layer_in_a_subgraph_is_proven_but_says_that_it_is_not_measured(zoo, tmp_path):
    original = zoo("llama-optimum-merged").with_name("decoder_model_merged.onnx")
    convert(original, tmp_path / "c.onnx", Recipe(Pattern(2, 4)))
    report = validate(original, tmp_path / "c.onnx", language=Language(new_tokens=0))
    inner = [s for s in report.sites if s.status == "pruned" and not s.tokens]
    assert check(report, PRUNED).passed and inner and all("subgraph" in s.note for s in inner)


def test_copies_of_the_files_elsewhere_validate_alike(pairs: Pairs, tmp_path):
    original, converted = (Path(shutil.copy(p, tmp_path)) for p in pairs["fused"])
    assert validate(original, converted, language=Language(new_tokens=0)).passed

"""`nmonnx bench`: the mathematics, the counts and the structure; never how long anything takes."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_llama
from onnx import TensorProto, helper, numpy_helper
from op_session import targets
from small_models import mlp, model, weights, write
from test_cli import nmonnx, refused

from nmonnx.bench import machine
from nmonnx.bench.bench import Plan, bench
from nmonnx.bench.layers import Layers, read_layers
from nmonnx.bench.memory import loading
from nmonnx.bench.profile import _Finder, _profile, profiles
from nmonnx.bench.rounds import median_interval, paired
from nmonnx.bench.subject import Case, Subject
from nmonnx.commands import bench as bench_command
from nmonnx.convert import convert
from nmonnx.errors import InputError, UsageError
from nmonnx.models import build
from nmonnx.onnx_file.graph import load
from nmonnx.pattern import Pattern
from nmonnx.pruning.recipe import Recipe

pytestmark = pytest.mark.skipif(not targets(), reason="the custom op library is not built")

FUSED = Recipe(Pattern(4, 16), kernel="fused")
FEW = ("--threads", "1", "--tokens", "1,3", "--past", "0,5", "--rounds", "6", "--profile", "1", "--loads", "1")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random decoder with a cache, and its conversion."""
    folder = tmp_path_factory.mktemp("llama")
    build(tiny_llama.write_folder(folder / "source", tiny_llama.CONFIG, tiny_llama.weights(tiny_llama.CONFIG)), folder)
    convert(folder / "model.onnx", folder / "sparse.onnx", FUSED)
    return folder / "model.onnx", folder / "sparse.onnx"


def layers(path: Path) -> Layers:
    return read_layers(load(path))


class TestInterval:
    @pytest.mark.parametrize("count", [6, 7, 9, 15, 40, 101])
    @pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
    def test_is_the_narrowest_pair_of_order_statistics_that_holds_the_level(self, count, level):
        values = np.random.default_rng(count).permutation(count).astype(float)  # the value is its rank
        found = median_interval(values, level)
        assert found is not None and found.low + found.high == count - 1
        heads = np.array([math.comb(count, k) for k in range(count + 1)]) / 2.0**count
        held = lambda rank: 1 - heads[: rank + 1].sum() - heads[count - rank :].sum()  # noqa: E731
        assert found.confidence == pytest.approx(held(int(found.low)))
        assert found.confidence >= level
        assert int(found.low) + 1 >= count / 2 - 1 or held(int(found.low) + 1) < level

    def test_holds_the_median_as_often_as_it_says(self):
        draws = np.random.default_rng(1).exponential(size=(4000, 15))
        found = [median_interval(row) for row in draws]
        inside = np.mean([i.low <= math.log(2) <= i.high for i in found])  # ln 2 is the median of the distribution
        assert found[0].confidence == pytest.approx(0.9648, abs=1e-4)
        assert inside == pytest.approx(found[0].confidence, abs=0.01)

    def test_too_few_values_have_none(self):
        assert median_interval([1.0] * 5) is None
        assert median_interval([1.0] * 6) is not None


def test_rounds_take_the_models_in_turn_each_round_the_other_way_about():
    order: list[str] = []
    times = paired([lambda: order.append("a"), lambda: order.append("b")], 4, least=0.0)
    assert order == [*"aaabbb", *"ab", *"ba", *"ab", *"ba"]
    assert times.shape == (4, 2) and (times > 0).all()


class TestWeights:
    def test_a_token_reads_the_kept_rows_and_several_all(self, tmp_path):
        dense = write(mlp(40, 48), tmp_path / "m.onnx")  # 40 = 16 + 16 + 8: the last group keeps 4 of 8
        convert(dense, tmp_path / "s.onnx", FUSED)
        before, after = layers(dense).linear, layers(tmp_path / "s.onnx").linear
        assert [layer.name for layer in before] == [layer.name for layer in after]
        assert [(b.stored, b.read(1, 0)) for b in before] == [(40 * 48 * 4, 40 * 48 * 4), (48 * 40 * 4, 48 * 40 * 4)]
        assert [a.read(1, 0) for a in after] == [12 * 48 * 4, 12 * 40 * 4]
        assert [a.read(2, 0) for a in after] == [a.stored for a in after] == [b.stored for b in before]

    def test_the_decoder_by_hand_from_its_initializers(self, llama):
        proto = onnx.load(llama[1])
        sizes = {t.name: numpy_helper.to_array(t).nbytes for t in proto.graph.initializer}
        fused = [node for node in proto.graph.node if node.op_type == "NMMatMul"]
        assert len(fused) == 14
        head = next(node for node in proto.graph.node if "lm_head" in node.name and node.op_type == "MatMul")
        kept = sum(sizes[node.input[1]] for node in fused) // 4 + sizes[head.input[1]]
        found = layers(llama[1]).linear
        assert len(found) == len(layers(llama[0]).linear) == 15
        assert sum(layer.read(1, 0) for layer in found) == kept
        assert {layer.role for layer in found} == {"q", "k", "v", "o", "gate", "up", "down", "lm_head"}

    def test_a_layer_that_is_only_pruned_in_front_reads_all(self, tmp_path):
        dense = write(mlp(64, 64), tmp_path / "m.onnx")
        convert(dense, tmp_path / "s.onnx", Recipe(Pattern(4, 16), kernel="prune"))
        assert [a.read(1, 0) for a in layers(tmp_path / "s.onnx").linear] == [64 * 64 * 4] * 2

    @pytest.mark.parametrize(
        ("asked", "dense_calls"),
        [({"phase": "prefill"}, {(1, 0), (1, 9)}), ({"phase": "decode"}, set()), ({"dense_prefix": 4}, {(1, 0)})],
    )
    def test_a_token_that_stays_dense_reads_all(self, llama, tmp_path, asked, dense_calls):
        out = llama[0].with_name("told.onnx")
        convert(llama[0], out, Recipe(Pattern(4, 16), kernel="fused", **asked), overwrite=True)
        layer = next(one for one in layers(out).linear if one.op == "NMMatMul")
        for call in ((1, 0), (1, 9)):
            assert layer.read(*call) == (layer.stored if call in dense_calls else layer.stored // 4)

    @pytest.mark.parametrize(("bits", "zeros"), [(8, False), (8, True), (4, True)])
    def test_quantised_rows_with_scales_and_zero_points(self, tmp_path, bits, zeros):
        k, n = 64, 40
        stored = np.zeros((k, n), np.int8) if bits == 8 else np.zeros((k, 16 * 2), np.uint8)
        scales = np.ones((2, n), np.float32)
        inputs = {"W": stored, "scales": scales, **({"zeros": np.zeros((2, n), stored.dtype)} if zeros else {})}
        node = helper.make_node(
            "NMMatMulNBits", ["x", *inputs], ["y"], "layer", domain="ai.nmonnx", keep=4, group=16, bits=bits,
            block_size=32,
        )  # fmt: skip
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["t", d]) for name, d in (("x", k), ("y", n))]
        tensors = [numpy_helper.from_array(array, name) for name, array in inputs.items()]
        graph = helper.make_graph([node], "g", values[:1], values[1:], tensors)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.nmonnx", 1)]
        path = write(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "q.onnx")
        (layer,) = layers(path).linear
        beside = scales.nbytes + (2 * n if zeros else 0)
        assert (layer.name, layer.stored) == ("layer", stored.nbytes + beside)
        assert layer.read(1, 0) == stored.nbytes // 4 + beside

    def test_matmulnbits_counts_its_scales_and_zero_points(self, tmp_path):
        text = """g (float[t, 64] x) => (float[t, 8] y) {
            y = com.microsoft.MatMulNBits <K = 64, N = 8, bits = 4, block_size = 32> (x, b, s, z)
        }"""
        b, s, z = np.zeros((8, 2, 16), np.uint8), np.ones(16, np.float32), np.zeros(8, np.uint8)
        path = write(model(text, b=b, s=s, z=z), tmp_path / "q.onnx")
        assert [one.stored for one in layers(path).linear] == [256 + 64 + 8]

    def test_a_weight_behind_dequantize_and_transpose(self, tmp_path):
        text = """g (float[t, 32] x) => (float[t, 16] y) {
            f = DequantizeLinear <axis = 0> (w, s, z)
            v = Transpose <perm = [1, 0]> (f)
            y = MatMul(x, v)
        }"""
        parts = {"w": np.zeros((16, 32), np.int8), "s": np.ones(16, np.float32), "z": np.zeros(16, np.int8)}
        path = write(model(text, **parts), tmp_path / "q.onnx")
        assert [one.stored for one in layers(path).linear] == [sum(part.nbytes for part in parts.values())]

    def test_a_function_reads_the_weights_of_all_its_calls(self, tmp_path):
        text = "g (float[t, 32] x) => (float[t, 32] y) {\n h = own.mlp(x, a, b)\n y = own.mlp(h, c, d)\n}"
        stored = {"a": (32, 48), "b": (48, 32), "c": (32, 80), "d": (80, 32)}
        proto = model(text, **{name: weights(*shape) for name, shape in stored.items()})
        body = [
            helper.make_node("MatMul", ["i", "up"], ["h"], "up"),
            helper.make_node("Relu", ["h"], ["r"], "relu"),
            helper.make_node("MatMul", ["r", "down"], ["o"], "down"),
        ]
        opset = [helper.make_opsetid("", 17)]
        proto.functions.append(helper.make_function("own", "mlp", ["i", "up", "down"], ["o"], body, opset))
        proto.opset_import.append(helper.make_opsetid("own", 1))
        path = write(proto, tmp_path / "f.onnx")
        found = layers(path)
        assert [one.stored for one in found.linear] == [4 * 32 * 48, 4 * 32 * 80, 4 * 32 * (48 + 80)]
        (profile,) = profiles(path, [Case(1, 2, 0)], 16, found.served, calls=1).values()
        assert set(profile.by_site) == {"function:mlp/down"}  # the layers that each call makes its own have no node


class TestProfile:
    def test_every_layer_is_found_under_one_name_in_both(self, llama):
        names = {layer.name for layer in layers(llama[0]).linear}
        cases = [Case(1, 1, 0), Case(1, 3, 5)]
        for path in llama:
            found = profiles(path, cases, 512, layers(path).served, calls=2)
            assert list(found) == cases
            for profile in found.values():
                assert set(profile.by_site) == names
                assert 0 < sum(profile.by_site.values()) <= sum(profile.by_op.values())
        assert "NMMatMul" in profile.by_op

    def test_nodes_without_a_name(self, tmp_path):
        path = write(mlp(), tmp_path / "m.onnx")
        (profile,) = profiles(path, [Case(1, 2, 0)], 16, layers(path).served, calls=1).values()
        assert set(profile.by_op) == {"MatMul", "Relu"}
        assert set(profile.by_site) == {layer.name for layer in layers(path).linear}

    def test_times_are_means_bodies_count_once_and_a_shared_prune_in_parts(self):
        event = lambda name, op, ts, dur: {  # noqa: E731
            "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": {"op_name": op}
        }  # fmt: skip
        call = [event("if", "If", 0, 100), event("p", "NMPrune", 10, 20), event("q", "MatMul", 40, 40)]
        last = [event("if", "If", 0, 50), event("p", "NMPrune", 10, 40)]
        found = _profile([call, last], {"p": ("q", "k"), "q": ("q",)})
        assert found.by_op == pytest.approx({"NMPrune": 30e-6, "If": 25e-6, "MatMul": 20e-6})
        assert found.by_site == pytest.approx({"q": 35e-6, "k": 15e-6})

    def test_a_fused_node_serves_the_one_it_is_called_after(self):
        sites = _Finder({"/l.1/MatMul": ("one",), "/l.1/MatMul_1": ("two",), "/l.1/MatMul_12": ()})
        assert sites("/l.1/MatMul/MatMulAddFusion") == ("one",)
        assert sites("/l.1/MatMul_1_Gemm") == ("two",)
        assert sites("/l.1/MatMul_12") == sites("/l.1/MatMuls") == sites("/l.2/MatMul") == ()


class TestCalls:
    def test_a_graph_without_text_gets_its_tokens_in_the_last_free_axis(self, tmp_path):
        subject = Subject(write(mlp(), tmp_path / "m.onnx"), 1)
        assert subject.feeds(7, 0, 16)["x"].shape == (1, 7, 32)

    def test_a_decoder_gets_random_past_values_of_that_length(self, llama):
        feeds = Subject(llama[0], 1).feeds(2, 5, 512)
        assert feeds["input_ids"].shape == (1, 2) and feeds["attention_mask"].shape == (1, 7)
        assert feeds["past_key_values.0.key"].shape[2] >= 5 and feeds["past_key_values.0.key"].any()

    def test_both_models_get_the_same_arrays(self, llama):
        one, other = (Subject(path, 1).feeds(3, 5, 512) for path in llama)
        assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)

    def test_a_call_that_fails_says_why(self, tmp_path):
        fixed = model("g (float[4, 32] x) => (float[4, 8] y) {\n y = MatMul(x, w)\n}", w=weights(32, 8))
        proto = model("g (float[t, 32] x) => (float[4, 8] y) {\n r = Reshape(x, s)\n y = MatMul(r, w)\n}",
                      w=weights(32, 8), s=np.array([4, 32]))  # fmt: skip
        assert not Subject(write(fixed, tmp_path / "f.onnx"), 1).has_length
        with pytest.raises(InputError, match="Reshape"):
            Subject(write(proto, tmp_path / "r.onnx"), 1).call(3, 0, 16)


def test_a_process_of_its_own_holds_more_after_loading(llama):
    for found in loading(llama, 1, 1, 0, 1):
        assert found.seconds > 0 and found.peak > found.before > 0 and found.processes == 1


def test_the_machine_reads_and_has_a_name():
    assert machine.read_bandwidth(2, size=1 << 20, rounds=1) > 0
    assert machine.cpu() and machine.cores() >= 1


class TestCommand:
    def test_json_holds_what_the_times_say(self, llama):
        run = nmonnx("bench", *llama, *FEW, "--json")
        assert run.returncode == 0, run.stderr
        data = json.loads(run.stdout)
        assert data["command"] == "bench" and len(data["inputs"]) == 2 and data["notes"] == []
        assert [(c["threads"], c["past"], c["tokens"]) for c in data["cases"]] == [
            (1, 0, 1), (1, 0, 3), (1, 5, 1), (1, 5, 3)
        ]  # fmt: skip
        stored = {name: data["models"][name]["weights"] for name in ("dense", "sparse")}
        for case in data["cases"]:
            times = np.array(case["times"])
            assert times.shape == (6, 2) == (case["rounds"], 2)
            ratios = np.sort(times[:, 1] / times[:, 0])
            assert case["ratio"] == pytest.approx(np.median(ratios))
            assert (case["interval"]["low"], case["interval"]["high"]) == pytest.approx((ratios[0], ratios[-1]))
            for column, name in enumerate(("dense", "sparse")):
                seconds, read = np.median(times[:, column]), case["weights_read"][name]
                assert case["tokens_per_second"][name] == pytest.approx(case["tokens"] / seconds)
                assert case["bandwidth"][name] == pytest.approx(read / seconds)
                assert read + case["weights_skipped"][name] == stored[name]
                assert case["weights_read_per_token"][name] == read / case["tokens"]
                assert len(case["profile"][name]["by_site"]) == 15
            assert case["weights_read"]["dense"] == stored["dense"]
            assert (case["weights_skipped"]["sparse"] > 0) == (case["tokens"] == 1)
        assert data["machine"]["read_bandwidth"]["1"] > 0
        assert all(data["models"][name]["loading"]["peak"] > 0 for name in stored)

    def test_tables_and_reports_with_the_plot(self, llama, tmp_path):
        pytest.importorskip("matplotlib")
        reports = [tmp_path / f"r.{ending}" for ending in ("png", "svg", "html", "md", "json")]
        run = nmonnx("bench", *llama, *FEW, *(part for path in reports for part in ("--report", path)))
        assert run.returncode == 0, run.stderr
        for title in ("Time of a call", "Weights of the linear layers", "Loading", "Time by operator", "lm_head"):
            assert title in run.stdout
        png, svg, html, md, data = reports
        assert png.read_bytes().startswith(b"\x89PNG")
        assert ET.parse(svg).getroot().tag.endswith("svg")
        assert "Time of a call" in html.read_text() and "<svg" in html.read_text()
        assert "| ratio |" in md.read_text() and json.loads(data.read_text())["cases"]

    def test_without_profile_and_loading(self, llama, tmp_path):
        quick = ("--threads", "1,2", "--tokens", "1", "--past", "0", "--rounds", "2", "--profile", "0", "--loads", "0")
        run = nmonnx("bench", *llama, *quick, "--report", tmp_path / "r.svg")
        assert run.returncode == 0, run.stderr
        assert "Loading" not in run.stdout and "Time by operator" not in run.stdout
        assert "An interval needs 6 rounds" in run.stdout
        assert (tmp_path / "r.svg").is_file()


class TestNotes:
    PLAN = Plan((1,), (1, 3), (0, 5), rounds=1, profiled=0, loads=0)

    def notes(self, dense: Path, sparse: Path, plan: Plan = PLAN) -> tuple[str, list[tuple[int, int]]]:
        done = bench(dense, sparse, plan)
        return " ".join(done.notes), [(r.case.tokens, r.case.past) for r in done.results]

    def test_a_graph_without_past_ignores_it(self, tmp_path):
        dense = write(mlp(64, 64), tmp_path / "m.onnx")
        convert(dense, tmp_path / "s.onnx", FUSED)
        words, cases = self.notes(dense, tmp_path / "s.onnx")
        assert "no inputs for past tokens" in words and cases == [(1, 0), (3, 0)]

    def test_no_token_dimension_is_one_call(self, tmp_path):
        proto = model("g (float[4, 32] x) => (float[4, 8] y) {\n y = MatMul(x, w)\n}", w=weights(32, 8))
        one, other = (write(proto, tmp_path / name) for name in ("a.onnx", "b.onnx"))
        words, cases = self.notes(one, other)
        assert "no token dimension" in words and cases == [(1, 0)]
        assert "is not a conversion by nmonnx" in words

    def test_the_same_file_twice(self, llama):
        words, cases = self.notes(llama[0], llama[0])
        assert words == "Both are the same file: what differs is noise." and len(cases) == 4

    def test_a_conversion_of_another_model(self, llama, tmp_path):
        other = write(mlp(64, 64), tmp_path / "m.onnx")
        convert(write(mlp(64, 64, ir=9), tmp_path / "o.onnx"), tmp_path / "s.onnx", FUSED)
        assert "was converted from another file" in self.notes(other, tmp_path / "s.onnx")[0]

    def test_other_inputs(self, tmp_path):
        proto = mlp(64, 64)
        other = model("g (float[b, t, 64] z) => (float[b, t, 64] y) {\n y = MatMul(z, w)\n}", w=weights(64, 64))
        words, cases = self.notes(write(proto, tmp_path / "m.onnx"), write(other, tmp_path / "o.onnx"))
        assert "differ in the inputs x, z" in words and len(cases) == 2

    def test_what_the_context_or_the_graph_does_not_allow_is_left_out(self, llama):
        plan = Plan((1,), (1, 100), (0, 100), rounds=1, profiled=0, loads=0)
        words, cases = self.notes(*llama, plan)
        assert "100 tokens after 100: the models were made for 128" in words
        assert cases == [(1, 0), (100, 0), (1, 100)]


class TestBadInput:
    def test_models_that_do_different_work(self, llama, tmp_path):
        other = write(mlp(64, 64), tmp_path / "m.onnx")
        assert "takes no tokens" in refused(tmp_path, 2, "bench", llama[0], other)

    def test_numbers(self, llama, tmp_path):
        assert "--tokens 'x'" in refused(tmp_path, 2, "bench", *llama, "--tokens", "x")
        assert "tokens must be" in refused(tmp_path, 2, "bench", *llama, "--tokens", "0")
        assert "past must be" in refused(tmp_path, 2, "bench", *llama, "--past=-1")
        assert "--rounds" in refused(tmp_path, 2, "bench", *llama, "--rounds", "0")

    def test_files(self, llama, tmp_path):
        assert "does not exist" in refused(tmp_path, 2, "bench", llama[0], "no.onnx")
        assert "r.pdf" in refused(tmp_path, 2, "bench", *llama, "--report", "r.pdf")

    def test_nothing_that_both_run(self, tmp_path):
        proto = model("g (float[t, 32] x) => (float[4, 8] y) {\n r = Reshape(x, s)\n y = MatMul(r, w)\n}",
                      w=weights(32, 8), s=np.array([4, 32]))  # fmt: skip
        path = write(proto, tmp_path / "m.onnx")
        assert "Reshape" in refused(tmp_path, 4, "bench", path, path, "--tokens", "3", "--threads", "1")

    def test_a_plot_without_matplotlib(self, llama, tmp_path, monkeypatch):
        monkeypatch.setattr(bench_command, "can_plot", lambda: False)
        with pytest.raises(UsageError, match=r"pip install 'nmonnx\[sweep\]'"):
            bench_command.command(*llama, report=[tmp_path / "r.png"])

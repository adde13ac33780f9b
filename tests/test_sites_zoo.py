"""Linear layers of every exported model: how many of which role, in which block, with which values."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import SHARED
from site_models import run_layer, without_names

from nmonnx.onnx_file.graph import load
from nmonnx.sites import Found, Site, Skipped, find_sites

ZOO = SHARED / "zoo"
FOLDERS = sorted(p.name for p in ZOO.glob("*-*") if list(p.glob("*.onnx"))) if ZOO.is_dir() else []
BLOCKS = 2

SPLIT = "q k v o gate up down"
PACKED = "qkv o gate up down"
PLAIN_SPLIT = "q k v o up down"
PLAIN = "qkv o up down"
ALL_PACKED = "qkv o gate_up down"

ROLES_OF_A_BLOCK = {
    **dict.fromkeys(["llama", "gemma2", "gemma3", "mistral", "qwen2", "qwen3", "smollm"], SPLIT),
    **dict.fromkeys(["gpt2", "gptneox", "falcon"], PLAIN),
    **dict.fromkeys(["opt", "phi"], PLAIN_SPLIT),
    "phi3": ALL_PACKED,
    "mixtral": "q k v o router" + 4 * " gate up down",
    "qwen3moe": "q k v o router" + 4 * " gate up down",
    "gptoss": "q k v o router experts experts",
}
EXCEPTIONS = {
    "llama-genai-fp16dml": SPLIT,
    "llama-genai-fp32-nofuse": SPLIT,
    "llama-genai-fp32-gateup": ALL_PACKED,
    "llama-ortopt-gpt2": PLAIN,
    "phi-genai-fp32": PLAIN,
    "gptoss-genai-fp16cuda": "qkv o router experts down",
    "gptoss-ts-fp32": "q k v o router",  # the experts' weights are gathered at run time
}
LEFT_ALONE = {
    "llama-dynamo-bf16": "BFLOAT16",
    "llama-genai-bf16cuda": "BFLOAT16",
    "llama-synth-conv1x1": "convolution",
    "llama-synth-leftweight": "on the left",
    "llama-synth-initinputs": "graph input",
}


def found_in(folder: str) -> Found:
    return find_sites(load(path_of(folder)))


def path_of(folder: str) -> Path:
    names = sorted(p for p in (ZOO / folder).glob("*.onnx"))
    return next((p for p in names if p.name == "model.onnx"), names[0])


def expected_roles(folder: str) -> Counter[str]:
    architecture, exporter = folder.split("-")[:2]
    roles = EXCEPTIONS.get(folder) or (
        PACKED if exporter == "genai" else ROLES_OF_A_BLOCK[architecture]  # the genai builder packs q, k, v
    )
    head = [] if folder.endswith("nohead") else ["lm_head"]
    return Counter(roles.split() * BLOCKS + head)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_linear_layer_of_the_architecture_is_found_with_its_role(folder: str) -> None:
    if folder == "llama-synth-functions":
        pytest.skip("its function body is one layer for two calls: tested by itself")
    found = found_in(folder)
    linears: list[Site | Skipped] = [*found.sites, *(s for s in found.skipped if s.linear)]
    assert Counter(s.role for s in linears) == expected_roles(folder)
    assert {s.block for s in linears if s.role != "lm_head"} == set(range(BLOCKS))
    names = [s.name for s in found.sites] + [s.name for s in found.skipped]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("folder", FOLDERS)
def test_only_what_cannot_be_pruned_is_left_alone(folder: str) -> None:
    left = [s for s in found_in(folder).skipped if s.linear]
    if folder in LEFT_ALONE:
        assert not found_in(folder).sites
        assert all(LEFT_ALONE[folder] in s.reason for s in left)
    elif folder == "gptoss-genai-fp16cuda":
        assert [s.role for s in left] == ["down", "down"] and all("MoE" in s.reason for s in left)
    else:
        assert not left


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_count_equals_a_brute_force_count_of_products_with_stored_matrices(folder: str) -> None:
    found = found_in(folder)
    inner = sum(s.name.endswith("/down") and s.op == "MoE" for s in found.skipped)
    assert found.total - inner == count_products(onnx.load(path_of(folder), load_external_data=False))


def test_function_bodies_are_found_once_for_all_their_calls() -> None:
    if "llama-synth-functions" not in FOLDERS:
        pytest.skip("the zoo is not there")
    found = found_in("llama-synth-functions")
    assert Counter(s.role for s in found.sites) == Counter([*"qkvo", *"qkvo", "lm_head", "gate", "up", "down"])
    inside = [s for s in found.sites if s.scope]
    assert {s.scope for s in inside} == {"function:LlamaMLP"}
    assert all(s.fusable and s.fusable.tensor is s.node.inputs[1] and s.fusable.proto is None for s in inside)


@pytest.mark.parametrize("folder", ["llama-optimum-merged", "gpt2-optimum-merged"])
def test_both_branches_of_a_merged_decoder_are_found_under_different_names(folder: str) -> None:
    if folder not in FOLDERS:
        pytest.skip("the zoo is not there")
    merged = find_sites(load(ZOO / folder / "decoder_model_merged.onnx")).sites
    single = find_sites(load(ZOO / folder / "decoder_model.onnx")).sites
    assert len(merged) == 2 * len(single) and len({s.name for s in merged}) == len(merged)
    weights = Counter(s.initializer for s in merged)
    assert set(weights.values()) == {2}, "both branches read the same stored weights"


GENAI_TESTS = "public/onnxruntime-genai/hf-internal-testing"
PUBLIC = {
    f"{GENAI_TESTS}/tiny-random-gpt2-fp32/past.onnx": PLAIN.split() * 5 + ["lm_head"],
    f"{GENAI_TESTS}/tiny-random-gpt2-fp16-cuda/past.onnx": PLAIN.split() * 5 + ["lm_head"],
    f"{GENAI_TESTS}/tiny-qwen35-cuda/decoder.onnx": PLAIN_SPLIT.split() * 2 + ["lm_head"],
    f"{GENAI_TESTS}/tiny-random-lfm2-fp32/decoder.onnx": ["lm_head"],
    "public/optimum-onnx-tests-assets-model.onnx": PLAIN_SPLIT.split() * 2 + ["other", "other"],  # classifier
    "public/onnxruntime-genai/whisper/dummy_decoder.onnx": [],
}


@pytest.mark.parametrize(("file", "roles"), PUBLIC.items())
def test_public_models_of_other_makers_have_the_layers_of_their_architecture(file: str, roles: list[str]) -> None:
    if not (ZOO / file).exists():
        pytest.skip("the zoo is not there")
    found = find_sites(load(ZOO / file))
    assert Counter(s.role for s in found.sites) == Counter(roles)
    assert not any(s.linear for s in found.skipped)


UNTOLD = {
    "llama-synth-functions": "function bodies stand for several blocks",
    "gptoss-genai-fp16cuda": "the router in front of a MoE node has no tell-tale",
    "gptoss-optimum-fp32": "structure names the two products of the experts gate_up and down",
}


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f not in UNTOLD])
def test_roles_and_blocks_are_the_same_when_all_names_are_stripped(folder: str, tmp_path: Path) -> None:
    path = path_of(folder)
    for data in path.parent.glob("*"):
        if data.is_file() and data.suffix not in (".onnx", ".json"):
            shutil.copy(data, tmp_path / data.name)
    onnx.save(without_names(onnx.load(path, load_external_data=False)), tmp_path / "m.onnx")
    named = [(s.op, s.role, s.block) for s in find_sites(load(path)).sites]
    assert [(s.op, s.role, s.block) for s in find_sites(load(tmp_path / "m.onnx")).sites] == named


READ_BACK = {
    **dict.fromkeys(["llama-optimum-fp32", "gpt2-optimum-fp32", "opt-dynamo-fp32", "llama-genai-fp32"], 1e-6),
    **dict.fromkeys(["llama-dynamo-noopt-fp32", "llama-synth-castweights", "llama-synth-constweights"], 1e-6),
    **dict.fromkeys(["llama-synth-einsum", "llama-synth-gemm", "llama-synth-transpose"], 1e-6),
    **dict.fromkeys(["gptoss-optimum-fp32", "qwen3moe-optimum-fp32", "llama-ortopt-all"], 1e-6),
    **dict.fromkeys(["llama-genai-fp16dml", "llama-optimum-fp16", "llama-ortq-q4f16"], 2e-3),
    **dict.fromkeys(["llama-genai-int4-acc1", "llama-genai-int4-asym", "llama-genai-int4-blk64"], 1e-4),
    **dict.fromkeys(["llama-genai-int4-kquant", "llama-genai-int4-rtn", "llama-genai-int8"], 1e-4),
    **dict.fromkeys(["llama-ortq-q2nbits", "llama-ortq-q4", "llama-ortq-q4asym", "llama-ortq-q8nbits"], 1e-4),
    **dict.fromkeys(["llama-ortq-q4qdq", "llama-genai-int4qdq", "llama-ortq-staticqdq", "llama-ortopt-q4qdq"], 1e-4),
    **dict.fromkeys(["llama-ortq-dynint8", "llama-ortq-dynuint8", "llama-ortopt-dynint8", "llama-ortq-bnb4"], 1e-4),
}


@pytest.mark.parametrize(("folder", "tolerance"), READ_BACK.items())
def test_weights_read_are_those_onnxruntime_multiplies_with(folder: str, tolerance: float) -> None:
    if folder not in FOLDERS:
        pytest.skip("the zoo is not there")
    path = path_of(folder)
    proto = onnx.load(path)
    for site in find_sites(load(path)).sites:
        if site.block in (0, None):
            weight = site.weight()
            assert weight.dtype == np.float32 and weight.shape[-2:] == (site.k, site.n)
            np.testing.assert_allclose(run_layer(proto, site), weight, atol=tolerance * np.abs(weight).max())


def test_expert_weights_inside_moe_are_read_transposed() -> None:
    if "gptoss-genai-fp16cuda" not in FOLDERS:
        pytest.skip("the zoo is not there")
    path = path_of("gptoss-genai-fp16cuda")
    stored = {t.name: t for t in onnx.load(path).graph.initializer}
    for site in find_sites(load(path)).sites:
        if site.op == "MoE":
            expected = onnx.numpy_helper.to_array(stored[site.initializer]).astype(np.float32)
            np.testing.assert_array_equal(site.weight(), expected.transpose(0, 2, 1))
            assert (site.k, site.n) == (64, 256)


def count_products(model: onnx.ModelProto) -> int:
    """Products whose second operand (first: weight on the left) leads by single-input operators to a stored
    matrix with more than one row; written without nmonnx."""
    bodies = {(f.domain, f.name): f for f in model.functions}

    def count(nodes: list[onnx.NodeProto], stored: dict[str, list[int]]) -> int:
        made = {o: n for n in nodes for o in n.output}
        for node in nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                stored = {**stored, node.output[0]: list(node.attribute[0].t.dims)}

        def matrix(name: str) -> bool:
            for _ in range(5):
                if name in stored:
                    return sum(d > 1 for d in stored[name]) > 1 or "_Q4" in name or "Bnb4" in name
                node = made.get(name)
                if node is None or node.op_type not in ("Transpose", "Cast", "Identity", "DequantizeLinear"):
                    return False
                name = node.input[0]
            return False

        total = 0
        for node in nodes:
            total += sum(count(list(a.g.node), stored) for a in node.attribute if a.type == a.GRAPH)
            if node.op_type in ("MatMulNBits", "MatMulBnb4", "MoE"):
                total += 1
            elif node.op_type in PRODUCTS:
                total += any(matrix(i) for i in node.input[:2])
        return total

    stored = {t.name: list(t.dims) for t in model.graph.initializer}
    total = count(list(model.graph.node), stored)
    for (domain, name), body in bodies.items():
        call = next(n for n in model.graph.node if (n.domain, n.op_type) == (domain, name))
        total += count(
            list(body.node), {f: stored[a] for f, a in zip(body.input, call.input, strict=False) if a in stored}
        )
    return total


PRODUCTS = {
    *("MatMul", "Gemm", "Einsum", "Conv", "FusedMatMul", "MatMulInteger", "Attention"),
    *("DynamicQuantizeMatMul", "MatMulIntegerToFloat"),
}

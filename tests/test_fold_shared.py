"""What several readers share in the models from bug reports: a correction of one layer touches no other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from corrected_models import random_correction

from nmonnx.convert import convert
from nmonnx.library import make_session
from nmonnx.onnx_file.graph import load
from nmonnx.onnx_file.identity import model_sha256
from nmonnx.pattern import Pattern
from nmonnx.pruning.recipe import Recipe
from nmonnx.records.corrections import Corrections
from nmonnx.sites import find_sites
from nmonnx.validate import validate

CASES = (
    "gemm_C_broadcasts",
    "gemm_transB_bias",
    "graph_input_shared_and_passthrough",
    "ort_fusions_around_linear",
    "w_identity_deduplicated",
    "w_tied_embedding_lm_head",
)


def behind(proto: onnx.ModelProto, tensor: str) -> set[str]:
    """Graph outputs that depend on a tensor of the main graph."""
    reached = {tensor}
    for _ in proto.graph.node:
        reached |= {o for node in proto.graph.node if reached & set(node.input) for o in node.output}
    return reached & {o.name for o in proto.graph.output}


@pytest.mark.parametrize("kernel", ["fused", "prune"])
@pytest.mark.parametrize("parts", ["weight bias", "scale", "low", "shift", "bias shift scale low weight"])
@pytest.mark.parametrize("name", CASES)
def test_other_outputs_are_bit_equal(shared: Path, tmp_path: Path, name: str, parts: str, kernel: str) -> None:
    case = next(
        c for c in map(json.loads, (shared / "cases" / "cases.jsonl").read_text().splitlines()) if c["id"] == name
    )
    source = shared / "cases" / case["model"]
    if not source.is_file():
        pytest.skip(f"case {name} is not there")
    with np.load(shared / "cases" / case["feeds"][0]["file"]) as file:
        feed = {tensor: file[f"a{i}"] for i, tensor in enumerate(case["feeds"][0]["names"])}
    recipe = Recipe(pattern=Pattern(4, 8), kernel=kernel, lm_head=True)
    proto = onnx.load(source)
    outputs = [o.name for o in proto.graph.output]
    plain = make_session(convert(source, tmp_path / "plain.onnx", recipe).out).run(None, feed)
    for index, site in enumerate(find_sites(load(source)).sites):
        correction = random_correction(set(parts.split()), k=site.k, n=site.n)
        fit = Corrections({site.name: correction}, model_sha256(source), recipe.to_json(), "by hand")
        done = convert(source, tmp_path / f"{index}.onnx", recipe, fit=fit)
        fold = next(p for p in done.passes if p.name == "fold-corrections")
        moved = behind(proto, site.output) if fold.changed or "shift" in parts else set()
        for output, before, after in zip(outputs, plain, make_session(done.out).run(None, feed), strict=True):
            assert (before.tobytes() != after.tobytes()) == (output in moved), (site.name, output, fold.left)
        if index == 0:
            assert [c.detail for c in validate(source, done.out).checks if not c.passed] == []

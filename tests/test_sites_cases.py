"""The conversion cases: as many linear layers found, and as many chosen, as each case says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import SHARED

from nmonnx.errors import InputError
from nmonnx.onnx_file.graph import load
from nmonnx.sites import find_sites, select

LIST = SHARED / "cases" / "cases.jsonl"
CASES = [json.loads(line) for line in LIST.read_text().splitlines()] if LIST.is_file() else []
CASES = [c for c in CASES if c["expect"] != "clear_error"]

PRUNED = {
    "ort_fused_ops": 3,  # the cases' other right answers: every linear layer of these is pruned
    "dynamic_int8_matmulinteger": 2,
    "channels_not_divisible_straddle": 2,
}
NOT_LAYERS = {"rope_constant_matmul": 2}  # counted by the case, but a product with one channel is no layer


@pytest.mark.parametrize("case", CASES, ids=[c["id"] for c in CASES])
def test_case_has_as_many_layers_and_prunes_as_many_as_it_says(case: dict[str, Any]) -> None:
    path = SHARED / "cases" / case["model"]
    if path.stat().st_size < 64:
        pytest.skip("the links of this case were not kept when it was copied")
    found = find_sites(load(path))
    chosen = select(found)
    pruned = PRUNED.get(case["id"], case["linears_pruned"])
    assert pruned in {case["linears_pruned"], *(a["linears_pruned"] for a in case["also_accept"])}
    assert len(chosen.chosen) == pruned
    assert len(chosen.chosen) + len(chosen.left) == found.total
    assert found.total + NOT_LAYERS.get(case["id"], 0) == case["linears_total"]
    assert all(s.reason for s in (*chosen.left, *found.skipped))


def test_products_with_one_channel_are_mentioned_but_not_counted() -> None:
    if not CASES:
        pytest.skip("the cases are not there")
    found = find_sites(load(SHARED / "cases" / "models" / "rope_constant_matmul" / "in" / "model.onnx"))
    assert [(s.linear, "one channel" in s.reason) for s in found.skipped] == [(False, True)] * 2


def test_every_weight_of_the_cases_can_be_read_in_its_shape() -> None:
    read = 0
    for case in CASES:
        try:
            sites = find_sites(load(SHARED / "cases" / case["model"])).sites
        except InputError:
            continue
        for site in sites[:4]:
            assert site.weight().shape[-2:] == (site.k, site.n)
            read += 1
    assert read > 80 or not CASES

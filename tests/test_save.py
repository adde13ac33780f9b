"""Writing a model: nothing is lost, weights stream, nothing is left behind."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import SHARED
from onnx import ModelProto, numpy_helper
from small_models import mlp, write

import nmonnx.save
from nmonnx.errors import InputError, ModelError, UsageError
from nmonnx.graph import Transposed, load
from nmonnx.save import save
from nmonnx.tensors import all_tensors, is_external
from nmonnx.weave import weave

EVERY_MODEL = [*SHARED.glob("zoo/**/*.onnx"), *SHARED.glob("cases/models/*/in/**/*.onnx")]


@pytest.mark.parametrize("path", sorted(EVERY_MODEL), ids=lambda p: str(p.relative_to(SHARED)))
def test_an_unedited_graph_weaves_to_the_very_same_protobuf(path):
    try:
        model = load(path)
    except InputError:
        pytest.skip("no valid model: another test's matter")
    if "not_sorted" in str(path):
        pytest.skip("comes out sorted: another test's matter")
    assert weave(model) == model.proto


def test_an_unsorted_graph_comes_out_sorted(tmp_path):
    proto = mlp()
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    woven = weave(load(write(proto, tmp_path / "m.onnx")))
    assert [n.output[0] for n in woven.graph.node] == ["h", "a", "y"]
    onnx.checker.check_model(woven)


def test_a_cycle_is_refused(tmp_path):
    proto = mlp()
    proto.graph.node[0].input[0] = "a"
    with pytest.raises(InputError, match="cycle"):
        weave(load(write(proto, tmp_path / "m.onnx")))


def contents(proto: ModelProto, path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t, str(path.parent)) for t in proto.graph.initializer}


@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["same folder", "other folder"])
def test_weights_arrive_whole_and_the_input_stays(tmp_path, external, elsewhere):
    source = write(mlp(), tmp_path / "m.onnx", external)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()}
    folder = tmp_path / "sub" if elsewhere else tmp_path
    folder.mkdir(exist_ok=True)
    model = load(source)
    up = model.proto.graph.initializer[0]
    model.repacked["up/KN"] = Transposed("up/KN", up)
    model.graph.nodes[0].inputs[1] = nmonnx.graph.gs.Variable("up/KN")
    out = save(model, folder / "out.onnx")
    written = onnx.load(out, load_external_data=False)
    expected = contents(mlp(), source)
    expected["up/KN"] = expected.pop("up").T
    got = contents(written, out)
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(got[name], values)
    assert {n: (p.read_bytes(), p.stat().st_mtime_ns) for n in before if (p := tmp_path / n)} == before
    assert {p.name for p in folder.iterdir() if p.is_file()} - set(before) == (
        {"out.onnx", "out.onnx.data"} if external else {"out.onnx"}
    )


def test_copied_data_has_aligned_offsets_shared_ranges_once_and_no_unused_bytes(tmp_path):
    source = write(mlp(k=1024, hidden=1024), tmp_path / "m.onnx", external=True)
    with open(f"{source}.data", "ab") as f:
        f.write(b"unused" * 100_000)
    proto = onnx.load(source, load_external_data=False)
    twin = proto.graph.initializer.add()
    twin.CopyFrom(proto.graph.initializer[0])
    twin.name = "twin"
    onnx.save(proto, source)
    (tmp_path / "to").mkdir()
    out = save(load(source), tmp_path / "to" / "o.onnx")
    spans = {
        t.name: {e.key: e.value for e in t.external_data}
        for t in onnx.load(out, load_external_data=False).graph.initializer
    }
    assert spans["twin"] == spans["up"]
    assert all(int(s["offset"]) % 4096 == 0 for s in spans.values())
    assert os.path.getsize(f"{out}.data") <= 2 * (1 << 22) + 4096


def test_a_model_that_outgrows_the_inline_limit_gets_external_data(tmp_path, monkeypatch):
    monkeypatch.setattr(nmonnx.save, "INLINE_LIMIT", 1 << 20)
    source = write(mlp(k=1024, hidden=1024), tmp_path / "m.onnx")
    out = save(load(source), tmp_path / "o.onnx")
    assert all(is_external(t) for t in all_tensors(onnx.load(out, load_external_data=False)))
    np.testing.assert_array_equal(contents(onnx.load(out), out)["up"], contents(onnx.load(source), source)["up"])


def test_file_modes_follow_the_umask(tmp_path):
    source = write(mlp(), tmp_path / "m.onnx", external=True)
    (tmp_path / "to").mkdir()
    old = os.umask(0o027)
    try:
        out = save(load(source), tmp_path / "to" / "o.onnx")
    finally:
        os.umask(old)
    assert {stat.S_IMODE(p.stat().st_mode) for p in out.parent.iterdir()} == {0o640}


def test_an_existing_output_is_kept_unless_overwrite(tmp_path):
    source = write(mlp(), tmp_path / "m.onnx")
    out = tmp_path / "o.onnx"
    out.write_bytes(b"mine")
    with pytest.raises(UsageError, match="--overwrite"):
        save(load(source), out)
    assert out.read_bytes() == b"mine"
    save(load(source), out, overwrite=True)
    onnx.checker.check_model(str(out))


@pytest.mark.parametrize("target", ["m.onnx", "b.onnx"])
def test_the_input_is_never_overwritten(tmp_path, target):
    source = write(mlp(), tmp_path / "m.onnx", external=True)
    os.rename(tmp_path / "m.onnx.data", tmp_path / "b.onnx.data")
    proto = onnx.load(source, load_external_data=False)
    for tensor in proto.graph.initializer:
        next(e for e in tensor.external_data if e.key == "location").value = "b.onnx.data"
    onnx.save(proto, source)
    with pytest.raises(UsageError, match="never changed"):
        save(load(source), tmp_path / target, overwrite=True)


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    source = write(mlp(), tmp_path / "m.onnx", external=True)
    (tmp_path / "to").mkdir()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nmonnx.save, "_pad", full)
    with pytest.raises(ModelError, match="No space left"):
        save(load(source), tmp_path / "to" / "o.onnx")
    assert not list((tmp_path / "to").iterdir())

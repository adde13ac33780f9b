"""Writing a model: nothing is lost, weights stream, nothing is left behind."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import SHARED
from onnx import ModelProto, numpy_helper
from small_models import mlp, write

import nmonnx.onnx_file.save
from nmonnx.errors import InputError, ModelError, UsageError
from nmonnx.onnx_file.graph import Transposed, load
from nmonnx.onnx_file.save import save
from nmonnx.onnx_file.tensors import all_tensors, is_external
from nmonnx.onnx_file.weave import weave

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
    model.graph.nodes[0].inputs[1] = nmonnx.onnx_file.graph.gs.Variable("up/KN")
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
    monkeypatch.setattr(nmonnx.onnx_file.save, "INLINE_LIMIT", 1 << 20)
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


def test_the_input_is_never_overwritten(tmp_path):
    source = write(mlp(), tmp_path / "m.onnx", external=True)
    with pytest.raises(UsageError, match="never changed"):
        save(load(source), source, overwrite=True)


def test_the_data_of_the_input_is_never_overwritten(tmp_path):
    source = write(mlp(), tmp_path / "m.onnx", external=True)
    os.rename(tmp_path / "m.onnx.data", tmp_path / "b.onnx.data")
    proto = onnx.load(source, load_external_data=False)
    for tensor in proto.graph.initializer:
        next(e for e in tensor.external_data if e.key == "location").value = "b.onnx.data"
    onnx.save(proto, source)
    model = load(source)
    model.repacked["up/KN"] = Transposed("up/KN", model.proto.graph.initializer[0])
    model.graph.nodes[0].inputs[1] = nmonnx.onnx_file.graph.gs.Variable("up/KN")
    with pytest.raises(UsageError, match="never changed"):
        save(model, tmp_path / "b.onnx", overwrite=True)


def test_a_leftover_data_file_is_in_the_way_only_of_new_data(tmp_path):
    source = write(mlp(), tmp_path / "m.onnx")
    (tmp_path / "o.onnx.data").write_bytes(b"left over")
    save(load(source), tmp_path / "o.onnx")
    assert (tmp_path / "o.onnx.data").read_bytes() == b"left over"


def test_sidecars_appear_with_the_model_or_not_at_all(tmp_path, monkeypatch):
    source = write(mlp(), tmp_path / "m.onnx")
    (tmp_path / "to").mkdir()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nmonnx.onnx_file.save.os, "chmod", full)
    with pytest.raises(ModelError, match="No space left"):
        save(load(source), tmp_path / "to" / "o.onnx", sidecars={"config.json": b"{}"})
    assert not list((tmp_path / "to").iterdir())
    monkeypatch.undo()
    save(load(source), tmp_path / "to" / "o.onnx", sidecars={"config.json": b"{}"})
    assert {p.name for p in (tmp_path / "to").iterdir()} == {"o.onnx", "config.json"}


@pytest.mark.parametrize("limit", [600, 4096, 8192, 9000, 20000])
def test_whatever_file_the_disk_is_too_small_for_nothing_stays(tmp_path, limit):
    """A real limit on file sizes, in a process of its own, with a sidecar larger than the model."""
    source = write(mlp(), tmp_path / "m.onnx", external=True)
    (tmp_path / "tokenizer.json").write_text("x" * 30_000)
    (tmp_path / "to").mkdir()
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        f"sys.argv = ['nmonnx', 'convert', {str(source)!r}, '-o', {str(tmp_path / 'to' / 'o.onnx')!r}];"
        "from nmonnx.cli import main; main()"
    )
    paths = os.pathsep.join(p for p in sys.path if p)
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )
    assert run.returncode == 3, run.stderr
    assert "nothing was left behind" in run.stderr
    assert not list((tmp_path / "to").iterdir())


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    source = write(mlp(), tmp_path / "m.onnx", external=True)
    (tmp_path / "to").mkdir()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nmonnx.onnx_file.save, "_pad", full)
    with pytest.raises(ModelError, match="No space left"):
        save(load(source), tmp_path / "to" / "o.onnx")
    assert not list((tmp_path / "to").iterdir())

"""Opening a model: what is refused, with one sentence that names the culprit."""

from __future__ import annotations

import builtins
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto
from small_models import mlp, model, write

from nmonnx.errors import InputError
from nmonnx.onnx_file.graph import load
from nmonnx.onnx_file.tensors import all_tensors


def refused(path: Path) -> str:
    with pytest.raises(InputError) as error:
        load(path)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_missing_file_is_refused(tmp_path):
    assert "does not exist" in refused(tmp_path / "no.onnx")


def test_a_folder_is_refused_and_the_model_in_it_is_named(tmp_path):
    write(mlp(), tmp_path / "model.onnx")
    assert "model.onnx" in refused(tmp_path)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "m.onnx").touch()
    assert "empty" in refused(tmp_path / "m.onnx")


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.99])
def test_a_truncated_file_is_refused(tmp_path, keep):
    whole = mlp().SerializeToString()
    (tmp_path / "m.onnx").write_bytes(whole[: int(len(whole) * keep)])
    assert "incomplete" in refused(tmp_path / "m.onnx")


def test_text_is_refused(tmp_path):
    (tmp_path / "m.onnx").write_text("hello, this is no model")
    assert "not a valid ONNX" in refused(tmp_path / "m.onnx")


def test_a_newer_ir_version_is_refused_with_the_supported_one(tmp_path):
    proto = mlp()
    proto.ir_version = 99
    message = refused(write(proto, tmp_path / "m.onnx"))
    assert "99" in message
    assert str(onnx.IR_VERSION) in message


def test_a_newer_opset_is_refused(tmp_path):
    proto = mlp()
    proto.opset_import[0].version = 999
    assert "opset 999" in refused(write(proto, tmp_path / "m.onnx"))


def test_a_model_without_opset_is_refused(tmp_path):
    proto = mlp()
    del proto.opset_import[:]
    assert "opset_import" in refused(write(proto, tmp_path / "m.onnx"))


def test_a_tensor_defined_twice_is_named(tmp_path):
    proto = mlp()
    proto.graph.node[2].output[0] = "h"
    assert "'h'" in refused(write(proto, tmp_path / "m.onnx"))


def test_a_node_name_used_twice_is_named(tmp_path):
    proto = mlp()
    for node in proto.graph.node:
        node.name = "twice"
    assert "'twice'" in refused(write(proto, tmp_path / "m.onnx"))


def deny(monkeypatch: pytest.MonkeyPatch, denied: Path) -> None:
    """Opening this file fails, as for a user who may not read it (root may read everything)."""
    real = builtins.open

    def guarded(file, *args, **options):  # type: ignore[no-untyped-def]
        if not isinstance(file, int) and Path(file).resolve() == denied.resolve():
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, *args, **options)

    monkeypatch.setattr(builtins, "open", guarded)


def test_a_file_that_may_not_be_read_is_refused_with_the_reason(tmp_path, monkeypatch):
    path = write(mlp(), tmp_path / "m.onnx")
    deny(monkeypatch, path)
    assert refused(path) == f"{str(path)!r} cannot be read: Permission denied"


def test_a_folder_that_may_not_be_searched_is_refused_with_the_reason(tmp_path, monkeypatch):
    path = write(mlp(), tmp_path / "m.onnx")

    def denied(*args, **options):  # type: ignore[no-untyped-def]
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", denied)
    message = refused(path)
    monkeypatch.undo()
    assert "m.onnx" in message
    assert "Permission denied" in message


@pytest.mark.parametrize("name", ["a\0b", "m" * 300])
def test_a_name_that_no_file_can_have_is_refused(tmp_path, name):
    assert "cannot be read" in refused(tmp_path / name)


def test_a_device_is_not_called_empty():
    message = refused(Path("/dev/zero"))
    assert "not a regular file" in message
    assert "empty" not in message


class TestExternalData:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return write(mlp(), tmp_path / "m.onnx", external=True)

    def edit(self, path: Path, **fields: str) -> None:
        proto = onnx.load(path, load_external_data=False)
        for entry in proto.graph.initializer[0].external_data:
            entry.value = fields.get(entry.key, entry.value)
        onnx.save(proto, path)

    def test_values_are_read_where_they_lie(self, path):
        model = load(path)
        for tensor, expected in zip(all_tensors(model.proto), mlp().graph.initializer, strict=True):
            np.testing.assert_array_equal(model.tensors.array(tensor), onnx.numpy_helper.to_array(expected))

    def test_a_missing_file_is_named(self, path):
        os.unlink(f"{path}.data")
        assert "m.onnx.data" in refused(path)

    def test_a_short_file_is_refused_with_both_sizes(self, path):
        os.truncate(f"{path}.data", 7000)
        assert "7000 bytes" in refused(path)

    @pytest.mark.parametrize("location", ["../m.onnx.data", "/etc/passwd", "a/../../x", "..\\x"])
    def test_a_location_outside_the_folder_is_refused(self, path, location):
        self.edit(path, location=location)
        assert "refused" in refused(path)

    @pytest.mark.parametrize("offset", ["9223372036854775708", "-64", "100000", "ten"])
    def test_an_offset_out_of_the_file_is_refused(self, path, offset):
        self.edit(path, offset=offset)
        refused(path)

    @pytest.mark.parametrize("location", ["a\0b", "x" * 5000])
    def test_a_location_that_no_file_can_have_is_refused(self, path, location):
        self.edit(path, location=location)
        assert "cannot be read" in refused(path)

    def test_a_file_that_may_not_be_read_is_named_with_the_reason(self, path, monkeypatch):
        deny(monkeypatch, Path(f"{path}.data"))
        message = refused(path)
        assert "m.onnx.data" in message
        assert "Permission denied" in message

    def test_a_file_that_can_no_longer_be_read_is_named_with_the_reason(self, path, monkeypatch):
        model = load(path)
        deny(monkeypatch, Path(f"{path}.data"))
        with pytest.raises(InputError, match=r"m\.onnx\.data.*cannot be read: Permission denied"):
            model.tensors.array(model.proto.graph.initializer[0])

    @pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
    def test_what_is_no_regular_file_is_not_called_missing(self, path, make):
        os.unlink(f"{path}.data")
        make(f"{path}.data")
        message = refused(path)
        assert "not a regular file" in message
        assert "missing" not in message

    def test_a_shape_beyond_64_bits_is_refused(self, path):
        proto = onnx.load(path, load_external_data=False)
        proto.graph.initializer[0].dims[:] = [32, 1 << 60]
        onnx.save(proto, path)
        assert "more bytes" in refused(path)

    def test_a_link_out_of_the_folder_is_refused(self, path, tmp_path_factory):
        outside = tmp_path_factory.mktemp("outside") / "secret"
        os.rename(f"{path}.data", outside)
        os.symlink(outside, f"{path}.data")
        assert "outside" in refused(path)

    def test_a_hugging_face_cache_is_read(self, path, tmp_path):
        """snapshots/REV/model.onnx and its data are links into blobs/."""
        blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "rev" / "onnx"
        blobs.mkdir()
        snapshot.mkdir(parents=True)
        for file, blob in ((path, "1111"), (Path(f"{path}.data"), "2222")):
            os.rename(file, blobs / blob)
            os.symlink(f"../../../blobs/{blob}", snapshot / file.name)
        model = load(snapshot / "m.onnx")
        up = model.proto.graph.initializer[0]
        np.testing.assert_array_equal(model.tensors.array(up), onnx.numpy_helper.to_array(mlp().graph.initializer[0]))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (TensorProto.INT4, [-8, 7, 0, -1, 3]),
        (TensorProto.UINT4, [0, 15, 8, 1, 3]),
        (TensorProto.BFLOAT16, [1.0, -2.5, 0.0, 3.0, 1e30]),
        (TensorProto.FLOAT16, [1.0, -2.5, 0.0, 65504.0, 6e-8]),
        (TensorProto.DOUBLE, [1.0, 1e300, 0.0, -1.0, 2.0]),
    ],
)
def test_packed_and_narrow_types_read_as_onnx_reads_them(tmp_path, kind, values):
    tensor = onnx.helper.make_tensor("w", kind, [5], values)
    proto = mlp()
    proto.graph.initializer.append(tensor)
    model = load(write(proto, tmp_path / "m.onnx"))
    read = model.tensors.array(model.proto.graph.initializer[-1])
    np.testing.assert_array_equal(read.astype(np.float64), onnx.numpy_helper.to_array(tensor).astype(np.float64))


def test_the_id_of_a_node_that_was_taken_out_is_not_given_to_another(tmp_path):
    write(model("g (float[n] x) => (float[n] y) { t = Neg(x) y = Identity(t) }"), tmp_path / "m.onnx")
    opened = load(tmp_path / "m.onnx")
    known = set(opened.origin)
    for node in list(opened.graph.nodes):
        node.inputs.clear()
        node.outputs.clear()
    opened.graph.nodes.clear()
    made = [gs.Node("Abs", inputs=[gs.Variable("a")], outputs=[gs.Variable("b")]) for _ in range(1000)]
    assert not known & {id(node) for node in made}

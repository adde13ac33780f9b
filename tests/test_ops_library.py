"""The shared library as ONNX Runtime and the package see it: exports, registration, shapes, kernels in C++."""

import ctypes
import gc
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import ops_reference
import pytest
from onnx import TensorProto, helper
from op_session import assert_same_bits, target, targets

from nmonnx import library
from nmonnx.errors import InputError, ModelError

REPOSITORY = Path(__file__).parents[1]
needs_library = pytest.mark.skipif(not targets(), reason="the custom op library is not built")


@needs_library
def test_only_register_custom_ops_is_exported():
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    command = ["nm", "-D", "--defined-only", str(library.get_library_path())]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert [line.split()[-1] for line in lines] == ["RegisterCustomOps"]


@needs_library
def test_an_old_or_strange_onnx_runtime_is_refused_with_a_sentence():
    """RegisterCustomOps is called with an OrtApiBase of ours, whose OrtApi has CreateStatus alone (slot 0)."""
    said: list[bytes] = []

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    def create(code: int, message: bytes) -> int:
        said.append(message)
        return 1

    api = (ctypes.c_void_p * 1)(ctypes.cast(create, ctypes.c_void_p))
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(lambda version: ctypes.addressof(api))
    function = ctypes.CDLL(str(library.get_library_path())).RegisterCustomOps
    function.restype = ctypes.c_void_p
    for version in (b"1.16.3", b"0.5.0", b"strange"):
        text = ctypes.create_string_buffer(version)
        address = ctypes.addressof(text)
        get_version = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda address=address: address)
        functions = (ctypes.cast(f, ctypes.c_void_p) for f in (get_api, get_version))
        assert function(None, (ctypes.c_void_p * 2)(*functions)) == 1
        assert said[-1] == b"nmonnx needs onnxruntime 1.17 or newer; this is " + version


@needs_library
def test_registering_twice_is_harmless(tmp_path):
    options = ort.SessionOptions()
    library.register(options)
    library.register(options)
    session = library.make_session(_save(tmp_path, _prune_model()), options=options)
    assert session.run(None, {"x": np.ones((1, 16), np.float32)})[0].sum() == 8


@needs_library
def test_an_unknown_simd_target_is_refused_with_the_known_ones():
    with target("quantum"), pytest.raises(ModelError, match=r"NMONNX_TARGET='quantum' .*these are: scalar"):
        library.register(ort.SessionOptions())


@needs_library
def test_one_model_reaches_every_slot_of_the_api(tmp_path):
    """Shape inference with names (63, 268, 271), a parallel prune and product (274), attributes (86), optional
    inputs by empty name (90), and a status with a message (0, 2, 93). The type of p is given: before 1.20 ONNX
    Runtime cannot infer it past an empty name."""
    model = _model(
        [
            helper.make_node("NMPrune", ["x", "", "shift"], ["p"], domain="ai.nmonnx", keep=8, group=16),
            helper.make_node("NMMatMul", ["p", "w"], ["y"], domain="ai.nmonnx", keep=16, group=16),
        ],
        [("x", TensorProto.FLOAT, ["batch", "tokens", 512]), ("shift", TensorProto.FLOAT, ["S"])],
        [("y", TensorProto.FLOAT, None)],
        [_constant("w", np.eye(512, 300, dtype=np.float32))],
    )
    model.graph.value_info.append(helper.make_tensor_value_info("p", TensorProto.FLOAT, None))
    session = library.make_session(_save(tmp_path, model), threads=2)
    if tuple(map(int, ort.__version__.split(".")[:2])) >= (1, 24):
        assert session.get_outputs()[0].shape == ["batch", "tokens", 300]
    x = np.random.default_rng(0).standard_normal((2, 200, 512)).astype(np.float32)
    shift = np.full(512, 0.25, np.float32)
    expected = ops_reference.prune(x, 8, 16, shift=shift)[..., :300]
    np.testing.assert_array_equal(session.run(None, {"x": x, "shift": shift})[0], expected)
    with pytest.raises(Exception, match=r"shift has shape \[511\]; it must be \[512\]"):
        session.run(None, {"x": x, "shift": shift[1:]})


@needs_library
def test_pruning_in_place_spoils_no_value_that_is_still_read(tmp_path):
    """The Abs in front may be overwritten, the graph input and the value with a second reader may not."""
    model = _model(
        [
            helper.make_node("Abs", ["x"], ["a"]),
            helper.make_node("NMPrune", ["a"], ["p"], domain="ai.nmonnx", keep=8, group=16),
            helper.make_node("NMPrune", ["x"], ["q"], domain="ai.nmonnx", keep=8, group=16),
            helper.make_node("Neg", ["x"], ["b"]),
            helper.make_node("NMPrune", ["b"], ["r"], domain="ai.nmonnx", keep=8, group=16),
            helper.make_node("Sub", ["b", "r"], ["rest"]),
        ],
        [("x", TensorProto.FLOAT, ["T", 64])],
        [(name, TensorProto.FLOAT, None) for name in ("p", "q", "r", "rest")],
        [],
    )
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    before = x.copy()
    p, q, r, rest = library.make_session(_save(tmp_path, model)).run(None, {"x": x})
    assert_same_bits(x, before)
    assert_same_bits(p, ops_reference.prune(np.abs(x), 8, 16))
    assert_same_bits(q, ops_reference.prune(x, 8, 16))
    assert_same_bits(r, ops_reference.prune(-x, 8, 16))
    np.testing.assert_array_equal(rest, -x - r)


@needs_library
def test_sessions_outlive_their_options_and_each_other(tmp_path):
    path = _save(tmp_path, _prune_model())
    first = library.make_session(path)
    for _ in range(3):
        library.make_session(path)
        gc.collect()
    assert first.run(None, {"x": np.ones((1, 16), np.float32)})[0].sum() == 8


def test_without_library_a_model_runs_on_its_functions_or_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "_installed", lambda: None)
    monkeypatch.setattr(library, "_built", lambda: None)
    with pytest.raises(ModelError, match="not found; build it with"):
        library.get_library_path()
    path = _save(tmp_path, _prune_model())
    with pytest.raises(ModelError, match="has no fallback functions, and the custom op library"):
        library.make_session(path)
    with_body = _prune_model()
    body = helper.make_node("Abs", ["x"], ["y"])
    function = helper.make_function(
        "ai.nmonnx", "NMPrune", ["x"], ["y"], [body], [helper.make_opsetid("", 17)], ["keep", "group"]
    )
    with_body.functions.append(function)
    session = library.make_session(_save(tmp_path, with_body))
    assert session.run(None, {"x": np.full((1, 16), -1, np.float32)})[0].sum() == 16


@needs_library
def test_library_false_takes_the_functions_even_where_the_library_is_there(tmp_path):
    model = _prune_model()
    body = helper.make_node("Identity", ["x"], ["y"])
    model.functions.append(
        helper.make_function("ai.nmonnx", "NMPrune", ["x"], ["y"], [body], [helper.make_opsetid("", 17)])
    )
    path = _save(tmp_path, model)
    x = np.ones((1, 16), np.float32)
    assert library.make_session(path, library=False).run(None, {"x": x})[0].sum() == 16
    assert library.make_session(path).run(None, {"x": x})[0].sum() == 8


def test_a_file_that_is_no_model_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        library.make_session(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ModelError, match="cannot load"):
        library.make_session(tmp_path / "text.onnx", library=False)


def test_the_kernels_stay_inside_their_buffers_under_sanitizers(tmp_path):
    """kernels_test of custom_ops/tests under AddressSanitizer and UndefinedBehaviorSanitizer."""
    if not shutil.which("cmake") or not _can_sanitize(tmp_path):
        pytest.skip("cmake or a compiler with sanitizers is not installed")
    build = tmp_path / "build"
    configure = ["cmake", "-S", str(REPOSITORY / "custom_ops"), "-B", str(build)]
    configure += ["-DNMONNX_SANITIZE=ON", "-DNMONNX_TESTS=ON"]
    headers = sorted(REPOSITORY.glob("build/*/CMakeCache.txt"))
    for line in headers[-1].read_text().splitlines() if headers else []:
        if line.startswith("NMONNX_HIGHWAY_INCLUDE_DIR:"):
            configure.append(f"-D{line}")
    configured = subprocess.run(configure, capture_output=True, text=True)
    if "Highway's headers were not found" in configured.stderr:
        pytest.skip("Highway's headers are not installed and could not be fetched")
    assert configured.returncode == 0, configured.stderr[-3000:]
    _succeed(["cmake", "--build", str(build), "--target", "kernels_test", "--parallel", "2"])
    tested = _succeed([str(build / "kernels_test")]).splitlines()
    assert tested[0] == "ok scalar"
    assert not targets() or tested == [f"ok {name}" for name in targets()]


def _prune_model() -> onnx.ModelProto:
    node = helper.make_node("NMPrune", ["x"], ["y"], domain="ai.nmonnx", keep=8, group=16)
    return _model([node], [("x", TensorProto.FLOAT, ["T", 16])], [("y", TensorProto.FLOAT, ["T", 16])], [])


def _model(nodes, inputs, outputs, constants) -> onnx.ModelProto:
    ends = [[helper.make_tensor_value_info(*value) for value in part] for part in (inputs, outputs)]
    graph = helper.make_graph(nodes, "test", ends[0], ends[1], constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.nmonnx", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def _constant(name: str, value: np.ndarray) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(value, name)


def _save(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _can_sanitize(folder: Path) -> bool:
    compiler = shutil.which("c++")
    if not compiler:
        return False
    source = folder / "try.cc"
    source.write_text("int main() {}")
    command = [compiler, "-fsanitize=address,undefined", str(source), "-o", str(folder / "try")]
    return subprocess.run(command, capture_output=True).returncode == 0


def _succeed(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout

"""What is refused before any work: exactly models that ONNX Runtime refuses, with a sentence that names the culprit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from small_models import mlp, weights

from nmonnx.errors import InputError
from nmonnx.onnx_file.graph import load

W = {"w": weights(32, 32)}
BRANCH = "g{name} () => (float[n, 32] {out}) {{ {body} }}"
LIN = "<domain: 'local', opset_import: ['' : {opset}]> Lin (a, b) => ({out}) {{ {body} }}".replace("'", '"')
CALL = "y = local.Lin(x, w)"


def graph(body: str, inputs: str = "float[n, 32] x", outputs: str = "float[n, 32] y", tail: str = "", **opsets: int):
    """A model from the text of its nodes, with a [32, 32] weight w."""
    imports = {"": 17, "com.microsoft": 1, "local": 1} | {k.replace("_", "."): v for k, v in opsets.items()}
    text = ", ".join(f'"{domain}" : {version}' for domain, version in imports.items())
    proto = onnx.parser.parse_model(
        f"<ir_version: 10, opset_import: [{text}]>\ng ({inputs}) => ({outputs}) {{ {body} }}\n{tail}"
    )
    proto.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in W.items())
    return proto


def stored(tensor: TensorProto, **changes: object) -> ModelProto:
    """x @ w with this tensor for w."""
    for field, value in changes.items():
        tensor.ClearField("raw_data")
        if value is not None:
            setattr(tensor, field, value)
    proto = graph("y = MatMul(x, w)")
    proto.graph.initializer[0].CopyFrom(tensor)
    return proto


def weight() -> TensorProto:
    return numpy_helper.from_array(W["w"], "w")


def floats(count: int) -> TensorProto:
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [32, 32], [1.0] * 1024)
    del tensor.float_data[:]
    tensor.float_data.extend([1.0] * count)
    return tensor


def opset(version: int) -> ModelProto:
    proto = graph("y = MatMul(x, w)")
    proto.opset_import[0].version = version
    return proto


def text_as_bytes() -> ModelProto:
    proto = graph("y = MatMul(x, w) z = Identity(s)", outputs="float[n, 32] y, string[2] z")
    proto.graph.initializer.append(TensorProto(name="s", dims=[2], data_type=TensorProto.STRING, raw_data=b"ab"))
    return proto


def branches(then: str, other: str = "e = Identity(x)", before: str = "") -> ModelProto:
    left, right = (BRANCH.format(name=n, out=o, body=b) for n, o, b in (("then", "t", then), ("other", "e", other)))
    return graph(f"{before} y = If(c) <then_branch = {left}, else_branch = {right}>", inputs="float[n, 32] x, bool c")


REFUSED: dict[str, tuple[ModelProto, str]] = {
    "an input that nothing makes": (graph("y = MatMul(nope, w)"), "nope"),
    "an input that nothing makes, of a node that nothing needs": (graph("y = MatMul(x, w) z = Relu(nope)"), "nope"),
    "an input in a branch that nothing makes": (branches("t = Identity(nope)"), "nope"),
    "an output that nothing makes": (graph("z = MatMul(x, w)"), "'y'"),
    "an output of a branch that nothing makes": (branches("q = Identity(x)"), "'t'"),
    "two graph inputs of one name": (graph("y = MatMul(x, w)", inputs="float[n, 32] x, float[n, 32] x"), "'x'"),
    "a graph input that a node makes": (graph("y = MatMul(x, w)", inputs="float[n, 32] x, float[n, 32] y"), "'y'"),
    "an input of a function that nothing makes": (
        graph(CALL, tail=LIN.format(opset=17, out="c", body="c = MatMul(nope, b)")),
        "nope",
    ),
    "an output of a function that nothing makes": (
        graph(CALL, tail=LIN.format(opset=17, out="q", body="c = MatMul(a, b)")),
        "'q'",
    ),
    "an unknown operator": (graph("h = MatMul(x, w) y = Nope(h)"), "Nope"),
    "an unknown operator in a function": (graph(CALL, tail=LIN.format(opset=17, out="c", body="c = Nope(a)")), "Nope"),
    "an unknown operator in a branch": (branches("t = Nope(x)"), "Nope"),
    "an operator of a later opset": (graph("y = Gelu(x)"), "Gelu"),
    "too few inputs": (graph("y = MatMul(x)"), "1 inputs"),
    "too many inputs": (graph("y = MatMul(x, w, w)"), "3 inputs"),
    "too few channels": (graph("y = MatMul(x, w)", inputs="float[n, 30] x"), "30 channels"),
    "too few channels of a vector": (graph("y = MatMul(x, w)", "float[30] x", "float[32] y"), "30 channels"),
    "too few channels of a Gemm": (graph("y = Gemm<transB = 1>(x, w)", inputs="float[n, 30] x"), "30 channels"),
    "too few channels, one layer further": (
        graph(
            "h = MatMul(x, w) v = Constant<value = float[2, 1] {1., 2.}>() y = MatMul(h, v)", outputs="float[n, 1] y"
        ),
        "32 channels",
    ),
    "raw data that is too short": (stored(weight(), raw_data=b"\0" * 100), "100 bytes"),
    "raw data that is too long": (stored(weight(), raw_data=b"\0" * 5000), "5000 bytes"),
    "no data": (stored(weight(), raw_data=None), "0 values"),
    "too few values": (stored(floats(5)), "5 values"),
    "too many values": (stored(floats(1026)), "1026 values"),
    "an unknown element type": (stored(weight(), raw_data=b"\0" * 4096, data_type=99), "99"),
    "text stored as raw bytes": (text_as_bytes(), "'s'"),
    "opset 0": (opset(0), "opset 0"),
    "a negative opset": (opset(-1), "opset -1"),
    "ai.onnx.ml 99": (graph("y = MatMul(x, w)", ai_onnx_ml=99), "ai.onnx.ml opset 99"),
}
TAKEN: dict[str, ModelProto] = {
    "nodes that are not sorted": graph("y = Relu(h) h = MatMul(x, w)"),
    "an output that is an input": graph("y = MatMul(x, w)", outputs="float[n, 32] y, float[n, 32] x"),
    "an output that is a weight": graph("y = MatMul(x, w)", outputs="float[n, 32] y, float[32, 32] w"),
    "one output twice": graph("y = MatMul(x, w)", outputs="float[n, 32] y, float[n, 32] y"),
    "a branch that reads the graph around it": branches("t = MatMul(x, w)"),
    "an input that is left out": graph("y = Clip(x, , m) m = Constant<value = float {1.}>()"),
    "a function that nothing calls": graph(
        "y = MatMul(x, w)", tail=LIN.format(opset=17, out="c", body="c = Nope(nope, b)")
    ),
    "a function of another opset": graph(CALL, tail=LIN.format(opset=18, out="c", body="c = MatMul(a, b)")),
    "operators that only ONNX Runtime has": graph(
        "y = SimplifiedLayerNormalization(x, s)", "float[n, 32] x, float[32] s"
    ),
    "LayerNormalization before it was in ONNX": graph(
        "y = LayerNormalization(x, s)", "float[n, 32] x, float[32] s", **{"": 16}
    ),
    "sizes that are not known": graph("y = MatMul(x, w)", inputs="float[n, k] x"),
    "an activation cast to the weight's type": graph("h = Cast<to = 1>(x) y = MatMul(h, w)", "float16[n, 32] x"),
    "the same domain under two names": graph("y = MatMul(x, w)", ai_onnx=16),
    "ai.onnx.ml 5": graph("y = MatMul(x, w)", ai_onnx_ml=5),
    "an unused domain of opset 0": graph("y = MatMul(x, w)", other=0),
    "raw data before values": stored(helper.make_tensor("w", TensorProto.FLOAT, [32, 32], W["w"].tobytes(), raw=True)),
}


def runs(path: Path) -> bool:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception:
        return False
    return True


def written(proto: ModelProto, folder: Path) -> Path:
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    return folder / "m.onnx"


@pytest.mark.parametrize("case", REFUSED)
def test_what_onnx_runtime_refuses_is_refused_with_the_culprit(tmp_path, case):
    proto, culprit = REFUSED[case]
    path = written(proto, tmp_path)
    assert not runs(path)
    with pytest.raises(InputError) as error:
        load(path)
    assert culprit in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", TAKEN)
def test_what_onnx_runtime_takes_is_taken(tmp_path, case):
    path = written(TAKEN[case], tmp_path)
    assert runs(path)
    load(path)


def test_an_initializer_stored_twice_is_said_to_be_there_twice(tmp_path):
    """ONNX Runtime takes one of the two without a word; which weight is meant cannot be known."""
    proto = graph("y = MatMul(x, w)")
    proto.graph.initializer.append(weight())
    with pytest.raises(InputError, match="initializer 'w' is there twice"):
        load(written(proto, tmp_path))


@pytest.mark.parametrize("name", sorted({s.name for s in onnx.defs.get_all_schemas() if not s.domain}))
def test_an_operator_is_unknown_in_the_opsets_in_which_onnx_runtime_does_not_know_it(tmp_path, name):
    for version in (7, 11, 17, 21):
        proto = graph(f"q = {name}(x) y = Identity(x)", **{"": version})
        path = written(proto, tmp_path)
        assert _unknown_here(path) == _unknown_there(path), version


def _unknown_here(path: Path) -> bool:
    try:
        load(path)
    except InputError as e:
        return "no operator" in str(e)
    return False


def _unknown_there(path: Path) -> bool:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as e:
        return "No Op registered" in str(e)
    return False


def test_values_of_every_type_are_as_many_as_onnx_writes(tmp_path):
    proto = mlp()
    for name, kind in TensorProto.DataType.items():
        if kind not in (TensorProto.UNDEFINED, TensorProto.STRING):
            proto.graph.initializer.append(helper.make_tensor(name, kind, [3], np.array([1, 0, 1])))
    load(written(proto, tmp_path))

"""Small models for tests, written as ONNX text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from onnx import ModelProto, numpy_helper


def model(text: str, opset: int = 17, ir: int = 8, **weights: np.ndarray) -> ModelProto:
    """A model from the text of its graph; each weight becomes an initializer."""
    proto = onnx.parser.parse_model(f'<ir_version: {ir}, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n{text}')
    proto.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in weights.items())
    return proto


def weights(*shape: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def write(proto: ModelProto, path: Path, external: bool = False) -> Path:
    """Save a model, with every weight in `NAME.data` if `external`."""
    if external:
        location = path.name + ".data"
        onnx.save(proto, path, save_as_external_data=True, location=location, size_threshold=0, convert_attribute=False)
    else:
        onnx.save(proto, path)
    return path


def mlp(k: int = 32, hidden: int = 48, opset: int = 17, ir: int = 8) -> ModelProto:
    """Two MatMuls with a Relu between."""
    return model(
        f"""mlp (float[b, t, {k}] x) => (float[b, t, {k}] y) {{
            h = MatMul(x, up)
            a = Relu(h)
            y = MatMul(a, down)
        }}""",
        opset,
        ir,
        up=weights(k, hidden, seed=1),
        down=weights(hidden, k, seed=2),
    )

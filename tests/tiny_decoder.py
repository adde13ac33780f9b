"""A decoder of two blocks without attention, small enough to train in a test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from small_models import weights

VOCAB, K, HIDDEN = 40, 16, 32


def write_decoder(folder: Path) -> Path:
    """Two blocks of RMSNorm, gate, up and down, between an embedding and a head."""
    nodes, constants = [], {"embed": weights(VOCAB, K), "norm": np.ones(K, np.float32)}
    nodes.append(helper.make_node("Gather", ["embed", "input_ids"], ["x0"]))
    for i in range(2):
        root = f"/model/layers.{i}/mlp"
        for j, (role, size) in enumerate({"gate": (K, HIDDEN), "up": (K, HIDDEN), "down": (HIDDEN, K)}.items()):
            constants[f"model.layers.{i}.mlp.{role}_proj.weight"] = weights(*size, seed=10 * i + j) / 4
        products = {
            role: helper.make_node(
                "MatMul",
                [read, f"model.layers.{i}.mlp.{role}_proj.weight"],
                [f"{role}{i}"],
                f"{root}/{role}_proj/MatMul",
            )
            for role, read in (("gate", f"n{i}"), ("up", f"n{i}"), ("down", f"m{i}"))
        }
        nodes += [
            helper.make_node("SimplifiedLayerNormalization", [f"x{i}", "norm"], [f"n{i}"], epsilon=1e-5),
            products["gate"],
            products["up"],
            helper.make_node("Sigmoid", [f"gate{i}"], [f"s{i}"]),
            helper.make_node("Mul", [f"gate{i}", f"s{i}"], [f"a{i}"]),
            helper.make_node("Mul", [f"a{i}", f"up{i}"], [f"m{i}"]),
            products["down"],
            helper.make_node("Add", [f"x{i}", f"down{i}"], [f"x{i + 1}"]),
        ]
    constants["lm_head.weight"] = weights(K, VOCAB, seed=99)
    nodes.append(helper.make_node("SimplifiedLayerNormalization", ["x2", "norm"], ["final"], epsilon=1e-5))
    nodes.append(helper.make_node("MatMul", ["final", "lm_head.weight"], ["logits"], "/lm_head/MatMul"))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "t"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "t", VOCAB])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path

"""One linear layer in several spellings, and the formula of a correction in stock operators, not folded."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import ModelProto
from small_models import model

from nmonnx.records.corrections import Correction

K, N, RANK = 32, 24, 4
NODES = {
    "MatMul": "y = MatMul(x, w)",
    "MatMul + Add": "m = MatMul(x, w) y = Add(m, b)",
    "Gemm": "y = Gemm(x, w, b)",
    "Gemm transB": "y = Gemm<transB = 1>(x, wt, b)",
    "Gemm transB without C": "y = Gemm<transB = 1>(x, wt)",
    "Transpose": "t = Transpose<perm = [1, 0]>(wt) y = MatMul(x, t)",
    "Cast": "c = Cast<to = TYPE>(half) y = MatMul(x, c)",
}


def layer(spelling: str, kind: type = np.float32) -> tuple[ModelProto, np.ndarray, np.ndarray]:
    """The model, its weight [K, N] and its bias [N], float64."""
    rng = np.random.default_rng(1)
    w, b = rng.standard_normal((K, N)).astype(np.float16), rng.standard_normal(N).astype(np.float16)
    nodes = NODES[spelling].replace("TYPE", "1" if kind is np.float32 else "10")
    stored = {"w": w.astype(kind), "wt": w.T.astype(kind).copy(), "b": b.astype(kind), "half": w}
    used = {name: values for name, values in stored.items() if any(c in nodes for c in (f"{name})", f"{name},"))}
    name = "float" if kind is np.float32 else "float16"
    proto = model(f"one ({name}[t, {K}] x) => ({name}[t, {N}] y) {{ {nodes} }}", **used)
    bias = b.astype(np.float64) if "b" in used else np.zeros(N)
    return proto, w.astype(np.float64), bias


def unfolded(weight: np.ndarray, bias: np.ndarray, c: Correction, keep: int, group: int) -> ModelProto:
    """P(x - shift) (weight - A B) diag(scale) + x A B + b + bias + shift (weight - A B) diag(scale), node by node, in
    float32; `weight` and `bias` are those of the layer."""
    low = c.low or (np.zeros((K, 1)), np.zeros((1, N)))
    parts = {
        "weight": weight if c.weight is None else c.weight,
        "A": low[0],
        "B": low[1],
        "scale": np.ones(N) if c.scale is None else c.scale,
        "shift": (np.zeros(K) if c.shift is None else c.shift)[None],
        "own": bias,
        "more": np.zeros(N) if c.bias is None else c.bias,
    }
    return model(
        f"""correct (float[t, {K}] x) => (float[t, {N}] y) {{
            z = Sub(x, shift)
            groups = Reshape(z, cut)
            size = Abs(groups)
            best, index = TopK<axis = 1>(size, keep)
            kept = GatherElements<axis = 1>(groups, index)
            none = Sub(groups, groups)
            some = ScatterElements<axis = 1>(none, index, kept)
            pruned = Reshape(some, whole)
            AB = MatMul(A, B)
            rest = Sub(weight, AB)
            product = MatMul(pruned, rest)
            scaled = Mul(product, scale)
            taken = MatMul(shift, rest)
            back = Mul(taken, scale)
            xA = MatMul(x, A)
            dense = MatMul(xA, B)
            y = Sum(scaled, dense, own, more, back)
        }}""",
        **{name: values.astype(np.float32) for name, values in parts.items()},
        cut=np.array([-1, group]),
        whole=np.array([-1, K]),
        keep=np.array([keep]),
    )


def random_correction(parts: set[str], seed: int = 2, k: int = K, n: int = N) -> Correction:
    rng = np.random.default_rng(seed)
    sizes = {"shift": k, "weight": (k, n), "scale": n, "bias": n}
    made = {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items() if name in parts}
    low = tuple(rng.standard_normal(s).astype(np.float32) for s in ((k, RANK), (RANK, n))) if "low" in parts else None
    return Correction(low=low, **made)


def weights_of(proto: ModelProto) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}

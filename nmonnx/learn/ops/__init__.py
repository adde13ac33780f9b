"""One small function for each ONNX operator, in torch: `OPS` maps "MatMul" or "domain::Name" to it."""

from nmonnx.learn.ops import attention, basic, norm, quantised, shape
from nmonnx.learn.ops.op import Op, Run, tensor_of

OPS: dict[str, Run] = {**basic.OPS, **shape.OPS, **norm.OPS, **attention.OPS, **quantised.OPS}

__all__ = ["OPS", "Op", "Run", "tensor_of"]

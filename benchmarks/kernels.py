"""Speed of the custom ops against ONNX Runtime's own kernels, in one process, round by round.

    python benchmarks/kernels.py matmul --shapes 2048x2048,4096x4096 --tokens 1,8,64 --threads 1
    python benchmarks/kernels.py prune --channels 2048 --tokens 1,64,256

matmul: NMMatMul against MatMul on the same weights. A session holds enough layers that their weights do not fit
any cache, each with weights of its own (ONNX Runtime shares equal constants). prune: NMPrune against ONNX
Runtime's Abs (one pass over the same tensor) and a plain copy. Rounds alternate A B B A; a figure is the median
of the rounds, a ratio the median of the rounds' ratios, below 1 where the custom op is faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from nmonnx.bench import machine
from nmonnx.bench.rounds import paired
from nmonnx.library import DOMAIN, register
from nmonnx.pattern import Pattern

COLD_BYTES = 192 << 20
TYPES = {"f32": (np.float32, TensorProto.FLOAT), "f16": (np.float16, TensorProto.FLOAT16)}


def main() -> None:
    arguments = _parse()
    print(f"{machine.cpu()}, onnxruntime {onnxruntime.__version__}, {arguments.threads} thread(s)")
    if arguments.what == "matmul":
        _bench_matmul(arguments)
    else:
        _bench_prune(arguments)


def _bench_matmul(arguments: argparse.Namespace) -> None:
    print("| K,N | pattern | T | MatMul us | NMMatMul us | ratio |\n|---|---|---|---|---|---|")
    for k, n in arguments.shapes:
        weights = _weights(k, n, arguments.type)
        dense = _session(_matmul_model(weights, None), arguments.threads)
        for pattern in arguments.patterns:
            sparse = _session(_matmul_model(weights, pattern), arguments.threads)
            for tokens in arguments.tokens:
                x = _activations(tokens, k, arguments.type)
                runs = [partial(session.run, None, {"x": x}) for session in (dense, sparse)]
                times = paired(runs, arguments.rounds) / len(weights)
                base, ours = np.median(times, axis=0) * 1e6
                ratio = np.median(times[:, 1] / times[:, 0])
                print(f"| {k},{n} | {pattern} | {tokens} | {base:.0f} | {ours:.0f} | {ratio:.2f} |", flush=True)


def _bench_prune(arguments: argparse.Namespace) -> None:
    print("| K | pattern | T | copy us | Abs us | NMPrune us | of Abs | of copy |\n|---|---|---|---|---|---|---|---|")
    for channels in arguments.channels:
        for pattern in arguments.patterns:
            for tokens in arguments.tokens:
                x = _activations(tokens, channels, arguments.type)
                y = np.empty_like(x)
                ours = _bound_run(_prune_model(pattern, arguments.type), x, arguments.threads)
                passing = _bound_run(_prune_model(None, arguments.type), x, arguments.threads)
                times = paired([partial(np.copyto, y, x), passing, ours], arguments.rounds)
                copy, base, prune = np.median(times, axis=0) * 1e6
                of_base, of_copy = np.median(times[:, 2:] / times[:, 1::-1], axis=0)
                print(
                    f"| {channels} | {pattern} | {tokens} | {copy:.1f} | {base:.1f} | {prune:.1f} | {of_base:.2f}"
                    f" | {of_copy:.2f} |",
                    flush=True,
                )


def _weights(k: int, n: int, kind: str) -> list[np.ndarray]:
    layers = max(2, -(-COLD_BYTES // (k * n * np.dtype(TYPES[kind][0]).itemsize)))
    rng = np.random.default_rng(0)
    return [rng.standard_normal((k, n), np.float32).astype(TYPES[kind][0]) for _ in range(layers)]


def _activations(tokens: int, channels: int, kind: str) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((tokens, channels), np.float32).astype(TYPES[kind][0])


def _matmul_model(weights: list[np.ndarray], pattern: Pattern | None) -> bytes:
    kind = numpy_helper.from_array(weights[0][:1]).data_type
    nodes = []
    for i in range(len(weights)):
        if pattern is None:
            nodes.append(helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]))
        else:
            nodes.append(_custom("NMMatMul", ["x", f"w{i}"], f"y{i}", pattern))
    constants = [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)]
    k, n = weights[0].shape
    outputs = [helper.make_tensor_value_info(f"y{i}", kind, ["T", n]) for i in range(len(weights))]
    return _model(nodes, [helper.make_tensor_value_info("x", kind, ["T", k])], outputs, constants)


def _prune_model(pattern: Pattern | None, kind: str) -> bytes:
    node = helper.make_node("Abs", ["x"], ["y"]) if pattern is None else _custom("NMPrune", ["x"], "y", pattern)
    values = [helper.make_tensor_value_info(name, TYPES[kind][1], ["T", "K"]) for name in "xy"]
    return _model([node], values[:1], values[1:], [])


def _custom(op: str, inputs: list[str], output: str, pattern: Pattern) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], domain=DOMAIN, keep=pattern.n, group=pattern.m)


def _model(nodes, inputs, outputs, constants) -> bytes:  # type: ignore[no-untyped-def]
    graph = helper.make_graph(nodes, "bench", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def _session(model: bytes, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    register(options)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _bound_run(model: bytes, x: np.ndarray, threads: int) -> Callable[[], object]:
    """Run without allocating the output anew each time."""
    session = _session(model, threads)
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    binding.bind_ortvalue_output("y", onnxruntime.OrtValue.ortvalue_from_numpy(np.empty_like(x)))
    return partial(session.run_with_iobinding, binding)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("matmul", "prune"))
    parser.add_argument("--shapes", type=_shapes, default="576x1536,2048x2048,2048x8192,4096x4096", help="KxN, ...")
    parser.add_argument("--channels", type=_numbers, default="2048", help="channels of prune")
    parser.add_argument("--patterns", type=lambda s: [Pattern.parse(p) for p in s.split(",")], default="8:16")
    parser.add_argument("--tokens", type=_numbers, default="1,2,4,8,16,24,64,256")
    parser.add_argument("--type", choices=tuple(TYPES), default="f32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _shapes(text: str) -> list[tuple[int, int]]:
    return [(int(k), int(n)) for k, n in (part.split("x") for part in text.split(","))]


if __name__ == "__main__":
    main()

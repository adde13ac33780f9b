"""Run a model and see its inner tensors, without a copy of its weights and without a file of our own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from onnx import ModelProto

from nmonnx.errors import RunError
from nmonnx.feeds import Signature, signature
from nmonnx.feeds.sample import explain
from nmonnx.onnx_file.skeleton import open_skeleton, point_at_files
from nmonnx.onnx_file.tensors import TensorReader


class Tapped:
    """A session in which chosen tensors of the main graph are outputs too.

    The skeleton goes to ONNX Runtime as bytes and names the user's own data files, resolved through links, which it
    maps; nothing is optimised and nothing is packed, so that memory stays flat and tensors are those of the file.
    """

    def __init__(self, path: Path, proto: ModelProto, reader: TensorReader, names: Iterable[str], threads: int) -> None:
        """Raises RunError when ONNX Runtime refuses the model."""
        import onnxruntime

        self._path = path
        self._inputs = {i.name for i in proto.graph.input}
        self._outputs = len(proto.graph.output)
        copy = ModelProto()
        copy.CopyFrom(proto)
        outputs = {o.name for o in copy.graph.output}
        for name in dict.fromkeys(names):
            if name not in outputs and name not in self._inputs:
                copy.graph.output.add(name=name)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # an arena only ever grows
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        point_at_files(copy, reader)
        try:
            self._session = open_skeleton(copy, options)
        except Exception as e:
            raise RunError(f"{path} with its inner tensors as outputs does not load: {explain(e)}") from e

    def signature(self) -> Signature:
        """The inputs and outputs of the model itself, without the taps. Raises InputError as `nmonnx.feeds` does."""
        return signature(self, self._path)  # type: ignore[arg-type]

    def get_inputs(self) -> list:
        return self._session.get_inputs()

    def get_outputs(self) -> list:
        return self._session.get_outputs()[: self._outputs]

    def run(
        self, arrays: Mapping[str, np.ndarray], names: Sequence[str], only_these: bool = False
    ) -> dict[str, np.ndarray]:
        """The values of tapped tensors (and graph inputs) for one feed; with `only_these` nothing is computed that they
        do not need. Raises RunError."""
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.only_execute_path_to_fetches = only_these
        options.log_severity_level = 4  # a failure is raised with its reason, not logged as well
        wanted = [n for n in dict.fromkeys(names) if n not in self._inputs]
        try:
            values = self._session.run(wanted, dict(arrays), options) if wanted else []
        except Exception as e:
            raise RunError(f"{self._path} failed while it ran: {explain(e)}") from e
        return {**{n: arrays[n] for n in names if n in self._inputs}, **dict(zip(wanted, values, strict=True))}

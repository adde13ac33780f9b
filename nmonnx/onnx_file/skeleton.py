"""Sessions of models that are not on disk: the skeleton goes to ONNX Runtime as bytes and names the data files of the
original, which it reads where they lie. No weight is copied, no file is written."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from onnx import ModelProto

from nmonnx.errors import ModelError
from nmonnx.library import register
from nmonnx.onnx_file.tensors import TensorReader, all_tensors, is_external

if TYPE_CHECKING:
    import onnxruntime

_FOLDER_OPTION = "session.model_external_initializers_file_folder_path"
_FOLDER_OPTION_SINCE = (1, 21)


def point_at_files(proto: ModelProto, reader: TensorReader) -> None:
    """Let the external tensors of `proto`, an edited model of `reader`'s folder, name their files in full, resolved
    through links; once only. Raises InputError when a file is missing or outside the folder."""
    root = _root()
    for tensor in all_tensors(proto):
        if is_external(tensor):
            file, _, _ = reader.span(tensor)
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = os.path.relpath(file, root)


def open_skeleton(proto: ModelProto, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """A session of a model that went through `point_at_files`, with the custom ops where the library is there.
    Raises what ONNX Runtime raises when it refuses the model."""
    import onnxruntime

    root = _root()
    if root == Path(root.anchor):
        options.add_session_config_entry(_FOLDER_OPTION, str(root))
    _register(options)
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _root() -> Path:
    import onnxruntime

    return _data_root(onnxruntime.__version__)


def _data_root(version: str) -> Path:
    """The folder that ONNX Runtime takes data locations of a model given as bytes from: one that we name (the root,
    so that any file can be named), in older releases the current one."""
    major, minor = (int(part) for part in version.split(".")[:2])
    here = Path(os.getcwd())
    return Path(here.anchor) if (major, minor) >= _FOLDER_OPTION_SINCE else here


def _register(options) -> None:  # type: ignore[no-untyped-def]
    with suppress(ModelError):  # without the library the model's fallback functions run
        register(options)

"""The custom op library: where it lies, and ONNX Runtime sessions that use it."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import TYPE_CHECKING

from nmonnx.errors import InputError, ModelError

if TYPE_CHECKING:
    import onnxruntime

DOMAIN = "ai.nmonnx"

_NAME = "libnmonnx_ops.so"
_REGISTERED = "nmonnx.library"  # session config entry that says the library is in these options
_ERRORS_ONLY = 3


def get_library_path() -> Path:
    """The shared library with the custom ops: that of the installed package, or in a source checkout the newest
    one under build/. Raises ModelError when there is none."""
    found = _installed() or _built()
    if found is None:
        raise ModelError(
            f"the custom op library {_NAME} was not found; build it with 'pip install .' or, in a checkout, with"
            " 'cmake -S custom_ops -B build/dev && cmake --build build/dev'"
        )
    return found


def register(options: onnxruntime.SessionOptions) -> None:
    """Make the ops known to the sessions of these options. Doing it twice is harmless. Raises ModelError when the
    library is not there or ONNX Runtime refuses it."""
    if _is_registered(options):
        return
    library = get_library_path()
    try:
        options.register_custom_ops_library(str(library))
    except Exception as e:  # onnxruntime's exceptions have no common base
        raise ModelError(f"ONNX Runtime refuses {library}: {_sentence(e)}") from e
    options.add_session_config_entry(_REGISTERED, str(library))


def make_session(
    path: str | Path,
    threads: int = 0,
    library: bool = True,
    options: onnxruntime.SessionOptions | None = None,
) -> onnxruntime.InferenceSession:
    """Load a model, converted or not, on the CPU.

    threads  threads inside an op; 0 lets ONNX Runtime choose
    library  False runs a converted model on its embedded fallback functions. They also run it when the library
             cannot be found
    options  session options to start from; they are changed

    Raises InputError when there is no such file, ModelError when ONNX Runtime cannot load it.
    """
    import onnxruntime

    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file")
    options = onnxruntime.SessionOptions() if options is None else options
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads
    missing = _try_register(options) if library else None
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime's exceptions have no common base
        if missing is not None and DOMAIN in str(e):
            raise ModelError(f"{path} has no fallback functions, and {missing}") from e
        raise ModelError(f"ONNX Runtime cannot load {path}: {_sentence(e)}") from e


def _installed() -> Path | None:
    try:
        distribution = importlib.metadata.distribution("nmonnx")
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(f"nmonnx/lib/{_NAME}")))
    return path if path.is_file() else None


def _built() -> Path | None:
    checkout = Path(__file__).parent.parent
    if not (checkout / "custom_ops" / "CMakeLists.txt").is_file():
        return None
    return max(checkout.glob(f"build/*/{_NAME}"), key=os.path.getmtime, default=None)


def _is_registered(options: onnxruntime.SessionOptions) -> bool:
    try:
        return bool(options.get_session_config_entry(_REGISTERED))
    except RuntimeError:  # no such entry
        return False


def _try_register(options: onnxruntime.SessionOptions) -> ModelError | None:
    try:
        get_library_path()
    except ModelError as missing:
        return missing
    register(options)
    return None


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())

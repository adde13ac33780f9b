"""nmonnx: N:M activation sparsity for LLMs exported to ONNX."""

from pathlib import Path

from nmonnx.library import get_library_path, make_session, register

__all__ = ["get_library_path", "make_session", "register"]
__version__ = "0.1.0"

_checkout = Path(__file__).parent.parent
if (_checkout / "passes" / "__init__.py").is_file() and (_checkout / "custom_ops").is_dir():
    __path__.append(str(_checkout))  # in a source checkout nmonnx.passes and nmonnx.models lie beside this folder

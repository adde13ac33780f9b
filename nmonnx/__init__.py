"""nmonnx: N:M activation sparsity for LLMs exported to ONNX."""

from pathlib import Path

_checkout = Path(__file__).parent.parent
if (_checkout / "passes" / "__init__.py").is_file() and (_checkout / "custom_ops").is_dir():
    __path__.append(str(_checkout))  # a source checkout: nmonnx.passes and nmonnx.models lie beside this folder

__version__ = "0.1.0"

"""Learn corrections with PyTorch, which is an optional extra, from an ONNX graph and its weights alone.

Importing this package raises UsageError when PyTorch is missing.
"""

from nmonnx.errors import UsageError

try:
    import torch as _torch  # noqa: F401
except ImportError as e:
    raise UsageError("learning needs PyTorch; install it with: pip install 'nmonnx[learn]'") from e

from nmonnx.learn.learn import learn
from nmonnx.learn.settings import LEARNED, REGIMES, Settings
from nmonnx.learn.torch_graph import TorchGraph

__all__ = ["LEARNED", "REGIMES", "Settings", "TorchGraph", "learn"]

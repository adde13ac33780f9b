"""A decoder small enough to compute by hand, in every way that exporters spell a cache.

The logits after token t are (sum of the embeddings of tokens 0..t) @ head; the cache holds one embedding per position.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper, parser

VOCAB, WIDTH = 11, 4
_RNG = np.random.default_rng(7)
EMBED = _RNG.standard_normal((VOCAB, WIDTH)).astype(np.float32)
HEAD = _RNG.standard_normal((WIDTH, VOCAB)).astype(np.float32)

_SPLIT = """
<ir_version: 8, opset_import: ["" : 18]>
toy (int64[b,t] ids, float[b,1,p,4] pk, float[b,1,p,4] pv EXTRA_INPUT)
 => (float[b,t,11] logits, float[b,1,n,4] nk, float[b,1,n,4] nv)
{
  one = Constant<value_ints = [1]>()
  rows = Gather(embed, ids)
  new = Unsqueeze(rows, one)
  JOIN
  minus_new = Neg(new)
  axis = Constant<value_int = 2>()
  sums = CumSum(nv, axis)
  length = Shape<start = 2, end = 3>(new)
  back = Neg(length)
  far = Constant<value_ints = [9223372036854775807]>()
  two = Constant<value_ints = [2]>()
  last = Slice(sums, back, far, two)
  flat = Squeeze(last, one)
  logits = MatMul(flat, head)
}
"""
_PLAIN_JOIN = "nk = Concat<axis = 2>(pk, minus_one_new)\n  nv = Concat<axis = 2>(pv, new)"
_MERGED_JOIN = """nv = If(use_cache) <
    then_branch = with () => (float[b,1,n,4] v1) { v1 = Concat<axis = 2>(pv, new) },
    else_branch = without () => (float[b,1,n,4] v2) { v2 = Identity(new) }
  >
  nk = If(use_cache) <
    then_branch = with_k () => (float[b,1,n,4] k1) { k1 = Concat<axis = 2>(pk, minus_one_new) },
    else_branch = without_k () => (float[b,1,n,4] k2) { k2 = Identity(minus_one_new) }
  >"""
_STACKED = """
<ir_version: 8, opset_import: ["" : 18]>
toy (int64[b,t] ids, float[2,b,1,p,4] pk) => (float[b,t,11] logits, float[2,b,1,n,4] nk)
{
  one = Constant<value_ints = [1]>()
  zero = Constant<value_ints = [0]>()
  rows = Gather(embed, ids)
  new = Unsqueeze(rows, one)
  key = Neg(new)
  key5 = Unsqueeze(key, zero)
  new5 = Unsqueeze(new, zero)
  both = Concat<axis = 0>(key5, new5)
  nk = Concat<axis = 3>(pk, both)
  first = Constant<value_int = 1>()
  values = Gather<axis = 0>(nk, first)
  axis = Constant<value_int = 2>()
  sums = CumSum(values, axis)
  length = Shape<start = 2, end = 3>(new)
  back = Neg(length)
  far = Constant<value_ints = [9223372036854775807]>()
  two = Constant<value_ints = [2]>()
  last = Slice(sums, back, far, two)
  flat = Squeeze(last, one)
  logits = MatMul(flat, head)
}
"""


def split_cache(path: Path, names: dict[str, str], merged: bool = False) -> Path:
    """Keys and values in two tensors; `names` renames ids, pk, pv, nk, nv, logits. The merged one ignores its cache
    inputs unless use_cache_branch is true."""
    join = "minus_one_new = Neg(new)\n  " + (_MERGED_JOIN if merged else _PLAIN_JOIN)
    text = _SPLIT.replace("JOIN", join).replace("EXTRA_INPUT", ", bool[1] use_cache" if merged else "")
    return _save(text, {**names, "use_cache": "use_cache_branch"}, path)


def stacked_cache(path: Path, names: dict[str, str]) -> Path:
    """Keys and values in one [2, B, H, past, D] tensor, as older GPT-2 exports have it."""
    return _save(_STACKED, names, path)


def expected_logits(tokens: np.ndarray) -> np.ndarray:
    """[B, T, V] for tokens [B, T]."""
    return np.cumsum(EMBED[tokens].astype(np.float64), axis=1) @ HEAD


def _save(text: str, names: dict[str, str], path: Path) -> Path:
    model = parser.parse_model(text)
    model.graph.initializer.extend([numpy_helper.from_array(EMBED, "embed"), numpy_helper.from_array(HEAD, "head")])
    _rename(model.graph, names)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for value in (*graph.input, *graph.output):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(n, n) for n in node.input]
        node.output[:] = [names.get(n, n) for n in node.output]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _rename(attribute.g, names)

"""Attention and rotary positions. Rows of one call have equal lengths: padding inside a batch is not told apart."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nmonnx.learn.ops.op import Op, Run


def _grouped(
    op: Op,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    past_k: Tensor | None,
    past_v: Tensor | None,
    lengths: Tensor,
    total: Tensor,
    *more: Tensor | None,
) -> tuple[Tensor, ...]:
    """com.microsoft::GroupQueryAttention, with packed queries, keys and values too."""
    cos, sin, positions, bias, sink = (*more, *[None] * 5)[:5]
    heads, pairs = op.get("num_heads"), op.get("kv_num_heads")
    if k is None or v is None:
        size = q.shape[-1] // (heads + 2 * pairs)
        q, k, v = q.split([heads * size, pairs * size, pairs * size], -1)
    queries, keys, values = _by_head(q, heads), _by_head(k, pairs), _by_head(v, pairs)
    seen = int(total.reshape(-1)[0]) - q.shape[1]
    if op.get("do_rotary", 0) and cos is not None and sin is not None:
        if positions is None:
            positions = seen + torch.arange(q.shape[1])[None]
        spin = (cos[positions.long()], sin[positions.long()], bool(op.get("rotary_interleaved", 0)))
        queries, keys = _rotated(queries, *spin), _rotated(keys, *spin)
    keys, values = _joined(past_k, keys, seen), _joined(past_v, values, seen)
    mask = _causal(queries, keys, op.get("local_window_size", -1))
    scale = op.get("scale", 0.0) or queries.shape[-1] ** -0.5
    if sink is None and op.get("smooth_softmax", 0) > 0:
        sink = torch.zeros(heads)
    y = attend(queries, keys, values, scale, mask, bias, op.get("softcap", 0.0), sink)
    return _flat(y), keys, values


def _multi_head(op: Op, q: Tensor, k: Tensor | None = None, v: Tensor | None = None, *more: Tensor | None):  # type: ignore[no-untyped-def]
    """com.microsoft::MultiHeadAttention."""
    bias, padding, extra, past_k, past_v = (*more, *[None] * 5)[:5]
    heads = op.get("num_heads")
    if k is None or v is None:
        q, k, v = q.unbind(3) if q.ndim == 5 else q.chunk(3, -1)
        q, k, v = (t.flatten(2) for t in (q, k, v))
    if bias is not None:
        parts = bias.split([q.shape[-1], bias.numel() - q.shape[-1] - v.shape[-1], v.shape[-1]])
        q, k, v = q + parts[0], k + parts[1] if k.ndim == 3 else k, v + parts[2] if v.ndim == 3 else v
    queries = _by_head(q, heads)
    keys, values = (t if t.ndim == 4 else _by_head(t, heads) for t in (k, v))
    keys, values = _joined(past_k, keys), _joined(past_v, values)
    mask = _causal(queries, keys) if op.get("unidirectional", 0) else None
    if padding is not None and padding.ndim == 2:
        allowed = padding.bool()[:, None, None, :]
        mask = allowed if mask is None else mask & allowed
    scale = op.get("scale", 0.0) or queries.shape[-1] ** -0.5
    return _flat(attend(queries, keys, values, scale, mask, extra)), keys, values


def _attention(op: Op, q: Tensor, k: Tensor, v: Tensor, *more: Tensor | None) -> tuple[Tensor, ...]:
    """Attention of opset 23."""
    given, past_k, past_v = (*more, *[None] * 3)[:3]
    flat = q.ndim == 3
    if flat:
        pairs = op.get("kv_num_heads")
        q, k, v = _by_head(q, op.get("q_num_heads")), _by_head(k, pairs), _by_head(v, pairs)
    keys, values = _joined(past_k, k), _joined(past_v, v)
    mask = None
    if op.get("is_causal", 0):  # counted from the first key that is not of the past
        rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(keys.shape[2])
        mask = columns - (0 if past_k is None else past_k.shape[2]) <= rows
    bias = given
    if given is not None and given.dtype == torch.bool:
        mask, bias = given if mask is None else mask & given, None
    scale = op.get("scale") or q.shape[-1] ** -0.5
    y = attend(q, keys, values, scale, mask, bias, op.get("softcap", 0.0))
    return _flat(y) if flat else y, keys, values


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
) -> Tensor:
    """[B, H, S, D] from q [B, H, S, D], k and v [B, G, T, D] with H a multiple of G. `mask` is true where a query may
    look, `bias` is added to the scores, `sink` [H] is the score of a key that has no value."""
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    if not softcap and sink is None:
        added = bias
        if bias is not None and mask is not None:
            added = bias.masked_fill(~mask, float("-inf"))
        return functional.scaled_dot_product_attention(q, k, v, mask if bias is None else added, scale=scale)
    scores = q @ k.transpose(-1, -2) * scale
    scores = torch.tanh(scores / softcap) * softcap if softcap else scores
    scores = scores if bias is None else scores + bias
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    if sink is not None:
        column = sink.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1] @ v
    return torch.softmax(scores, -1) @ v


def _causal(q: Tensor, k: Tensor, window: int = -1) -> Tensor:
    columns = torch.arange(k.shape[2])
    rows = columns[k.shape[2] - q.shape[2] :, None]
    mask = columns <= rows
    return mask & (columns > rows - window) if window > 0 else mask


def _joined(past: Tensor | None, new: Tensor, seen: int | None = None) -> Tensor:
    return new if past is None else torch.cat([past[:, :, :seen], new], 2)


def _by_head(x: Tensor, heads: int) -> Tensor:
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [B, H, S, D] with the first 2 R channels turned; cos and sin [B or 1, S, R]."""
    half = cos.shape[-1]
    turned, kept = x[..., : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    pair = (a * cos - b * sin, b * cos + a * sin)
    new = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([new, kept], -1) if kept.shape[-1] else new


def _turn(op: Op, x: Tensor, cos: Tensor, sin: Tensor, width: int) -> Tensor:
    rank, heads = x.ndim, op.get("num_heads", 0)
    if rank == 3:
        x = _by_head(x, heads or x.shape[-1] // width)
    y = _rotated(x, cos, sin, bool(op.get("interleaved", 0)))
    return _flat(y) if rank == 3 else y


def _rotary(op: Op, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
    """RotaryEmbedding of opset 23."""
    if positions is not None:
        cos, sin = cos[positions.long()], sin[positions.long()]
    return _turn(op, x, cos, sin, 2 * cos.shape[-1])


def _rotary_microsoft(op: Op, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    length = x.shape[1] if x.ndim == 3 else x.shape[2]
    if positions.numel() == 1 and length > 1:  # where the first token stands
        positions = int(positions) + torch.arange(length)[None]
    positions = positions.long().reshape(-1, length)
    scale = op.get("scale", 1.0)
    return _turn(op, x, cos[positions] * scale, sin[positions] * scale, 2 * cos.shape[-1])


OPS: dict[str, Run] = {
    "com.microsoft::GroupQueryAttention": _grouped,
    "com.microsoft::MultiHeadAttention": _multi_head,
    "Attention": _attention,
    "RotaryEmbedding": _rotary,
    "com.microsoft::RotaryEmbedding": _rotary_microsoft,
}

"""A pruned product in torch, with what can be learned about it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from nmonnx.pruning.treatment import Treatment
from nmonnx.records.corrections import Correction

_MOST = 4.0
"""The most that VAR scales a token by, as in `nmonnx.reference`."""


class Pruned(nn.Module):
    """x [..., K] -> nu P(x - shift) (W - A B) diag(scale) + x A B + bias + shift (W - A B) diag(scale), [..., N].

    It is the formula of `Correction`, without the layer's own bias. What is in `learned` is trained:
    "shift", "scale", "bias", "low" and "weight"; the rest stays as the treatment and the correction `start` say.
    Gradients reach the channels that are kept alone, or all (`through`), as if nothing was pruned.
    Products are computed in bfloat16 if `half`.
    """

    shift: Tensor | None
    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None
    low_a: Tensor | None
    low_b: Tensor | None

    def __init__(
        self,
        treatment: Treatment,
        weight: np.ndarray,
        learned: frozenset[str] = frozenset(),
        start: Correction | None = None,
        through: bool = False,
        half: bool = False,
    ) -> None:
        super().__init__()
        start = start or Correction()
        self._treatment, self._through, self._half = treatment, through, half
        self._c = _tensor(treatment.scale)
        self._order = None if treatment.order is None else torch.from_numpy(np.array(treatment.order, np.int64))
        k, n = weight.shape
        shift = start.shift if start.shift is not None else treatment.shift
        if shift is None and "shift" in learned:
            shift = np.zeros(k, np.float32)
        given = {
            "shift": None if shift is None else np.broadcast_to(shift, (k,)),
            "weight": weight if start.weight is None else start.weight,
            "scale": np.ones(n) if start.scale is None and "scale" in learned else start.scale,
            "bias": np.zeros(n) if start.bias is None and "bias" in learned else start.bias,
            "low_a": start.low[0] if start.low else None,
            "low_b": start.low[1] if start.low else None,
        }
        for name, values in given.items():
            trained = name.removesuffix("_a").removesuffix("_b") in learned
            tensor = _tensor(values)
            setattr(self, name, nn.Parameter(tensor, requires_grad=trained) if tensor is not None else None)

    def forward(self, x: Tensor) -> Tensor:
        z = x if self.shift is None else x - self.shift
        mask = keep_mask(z, self._treatment.pattern.n, self._treatment.pattern.m, self._c, self._order)
        kept = z * mask
        if self._treatment.variance:
            kept = kept * variance_ratio(z, kept)
        if self._through:
            kept = z + (kept - z).detach()
        low = None if self.low_a is None or self.low_b is None else (self.low_a, self.low_b)
        weight = self.weight if low is None else self.weight - low[0] @ low[1]
        y = self._product(kept, weight)
        if self.shift is not None:
            y = y + self.shift @ weight
        y = y if self.scale is None else y * self.scale
        y = y if low is None else y + x @ low[0] @ low[1]
        return y if self.bias is None else y + self.bias

    def correction(self) -> Correction:
        """What was learned, with what it started from."""
        found = {name: p.detach().numpy().copy() for name, p in self.named_parameters() if self._counts(name, p)}
        return Correction.of_arrays(found)

    def _counts(self, name: str, parameter: nn.Parameter) -> bool:
        if name == "shift" and not parameter.requires_grad:
            return False
        return name != "weight" or parameter.requires_grad

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        return (x.bfloat16() @ weight.bfloat16()).float() if self._half else x @ weight


@torch.no_grad()
def keep_mask(z: Tensor, keep: int, group: int, scale: Tensor | None = None, order: Tensor | None = None) -> Tensor:
    """Which elements of z [..., K] stay, as `nmonnx.reference.keep_mask` for finite numbers."""
    score = z.abs().float()
    score = score if scale is None else score * scale
    score = score if order is None else score[..., order]
    channels = score.shape[-1]
    padded = nn.functional.pad(score, (0, -channels % group), value=float("-inf"))
    groups = padded.reshape(-1, group).numpy()
    mask = torch.from_numpy(_largest(groups, keep)).reshape(padded.shape)[..., :channels]
    if order is None:
        return mask
    placed = torch.empty_like(mask)
    placed[..., order] = mask
    return placed


def variance_ratio(z: Tensor, kept: Tensor) -> Tensor:
    """nu of each token [..., 1], as `nmonnx.reference.variance_ratio`."""
    before, after = (v.var(-1, unbiased=False, keepdim=True) for v in (z, kept))
    known = (after > 0) & (before > 0)
    ratio = torch.sqrt(torch.where(known, before, 1.0) / torch.where(known, after, 1.0))
    return ratio.clamp(max=_MOST)


def _largest(rows: np.ndarray, keep: int) -> np.ndarray:
    """Booleans [R, M]: the `keep` largest of each row; of equal ones the first."""
    width = rows.shape[1]
    if keep >= width:
        return np.ones(rows.shape, bool)
    least = np.partition(rows, width - keep, axis=1)[:, width - keep, None]
    mask = rows >= least
    tied = np.flatnonzero(mask.sum(axis=1) != keep)
    if len(tied):
        ranked = np.argsort(-rows[tied], axis=1, kind="stable")[:, :keep]
        fixed = np.zeros((len(tied), width), bool)
        np.put_along_axis(fixed, ranked, True, axis=1)
        mask[tied] = fixed
    return mask


def _tensor(values: np.ndarray | None) -> Tensor | None:
    return None if values is None else torch.from_numpy(np.array(values, np.float32))

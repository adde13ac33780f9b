"""`Task`: what both regimes work on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmonnx.errors import InputError
from nmonnx.learn.pruned import Pruned
from nmonnx.learn.settings import Settings
from nmonnx.learn.torch_graph import Product, TorchGraph
from nmonnx.learn.training import Text
from nmonnx.onnx_file.save import staging
from nmonnx.sites import Found, Site

Feeds = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Task:
    """products  the pruned products that are trained, by name of the chosen sites
    key       what a checkpoint must agree with
    coarse    products in bfloat16 for layers that are not pruned, all of them or none
    """

    graph: TorchGraph
    found: Found
    chosen: Sequence[Site]
    products: Mapping[str, Pruned]
    text: Text
    settings: Settings
    checkpoint: Path | None
    key: str
    coarse: Mapping[Site, Product] = field(default_factory=dict)

    def run(self, feeds: Feeds, wanted: Sequence[str], sites: Sequence[Site] = ()) -> dict[str, Tensor]:
        """Run with the layers `sites` pruned."""
        return self.graph.run(feeds, wanted, {**self.coarse, **{s: self.products[s.name] for s in sites}})

    def start_of(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        """The parameters that are trained, to be put back by `restore`."""
        return {
            s.name: {n: p.detach().clone() for n, p in self.products[s.name].named_parameters() if p.requires_grad}
            for s in sites
        }

    def restore(self, values: Mapping[str, Mapping[str, Tensor]]) -> None:
        with torch.no_grad():
            for site, parameters in values.items():
                own = dict(self.products[site].named_parameters())
                for name, value in parameters.items():
                    own[name].copy_(value)

    def save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint, if there is one. Raises ModelError when that fails."""
        if self.checkpoint is not None:
            with staging(self.checkpoint) as staged:
                torch.save({"key": self.key, **state}, staged.open(self.checkpoint))

    def load(self) -> dict[str, Any]:
        """What `save` wrote for this very task; nothing otherwise. Raises InputError when it cannot be read."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return {}
        try:
            state = torch.load(self.checkpoint, weights_only=True)
        except OSError as e:
            raise InputError(f"{self.checkpoint} cannot be read: {e}; remove it") from e
        except Exception:  # whatever a damaged file makes torch raise
            return {}
        return state if isinstance(state, dict) and state.get("key") == self.key else {}


def coarse_products(graph: TorchGraph, sites: Sequence[Site]) -> dict[Site, Product]:
    """Each layer whose weight is a matrix in the main graph, multiplied in bfloat16."""
    return {site: _coarse(site) for site in sites if graph.reaches(site) and site.node.op == "MatMul"}


def _coarse(site: Site) -> Product:
    weight = torch.tensor(site.weight()).bfloat16()
    return lambda x: (x.bfloat16() @ weight).float()


def verdict(before: float, after: float, what: str) -> str | None:
    """Why a correction is refused; None when it lowers the held-out loss."""
    if after < before:
        return None
    return f"the held-out {what} would be {after:.6g}, without it is {before:.6g}"

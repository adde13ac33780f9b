"""`TorchGraph`: run the main graph of an ONNX decoder in torch, so that gradients can be taken through it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from nmonnx.errors import UsageError
from nmonnx.learn.ops import OPS, Op, tensor_of
from nmonnx.onnx_file.graph import Model
from nmonnx.sites import Site

Intercept = Callable[[Tensor], Tensor]
"""Of the input of a site, x [..., K]: another one in its place."""

Product = Callable[[Tensor], Tensor]
"""Of the input of a site, x [..., K]: what takes the place of x W [..., N]. The layer's own bias, if its node adds one,
comes on top."""


class TorchGraph:
    """Values are torch tensors on the CPU; what the graph stores or computes in float16 or bfloat16 is float32 here.
    Constants are read from the file when a run first needs them, and never trained themselves."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._stored = {t.name: t for t in model.proto.graph.initializer}
        opset = model.opset
        self.ops = [Op.of(node, opset, model.tensors.array) for node in model.proto.graph.node]
        self._maker = {name: op for op in self.ops for name in op.outputs if name}
        self._constants: dict[str, Tensor] = {}
        self._fixed: set[str] = set(self._stored)
        for op in self.ops:
            if all(name in self._fixed for name in op.inputs if name):
                self._fixed.update(op.outputs)

    def run(
        self,
        feeds: Mapping[str, Tensor | np.ndarray],
        wanted: Sequence[str],
        products: Mapping[Site, Product] | None = None,
        inputs: Mapping[Site, Intercept] | None = None,
    ) -> dict[str, Tensor]:
        """The tensors `wanted`, by name. `feeds` gives inputs of the graph, or any tensor inside it, which is then not
        computed: so a part of the graph is run. Only what is needed is computed.

        Raises UsageError naming an operator that is not handled, an input that was not given, or a site that cannot
        be reached here because it lies in a subgraph or function.
        """
        given = {name: v if isinstance(v, Tensor) else tensor_of(v) for name, v in feeds.items()}
        hooks = _Hooks(self.op_of, products or {}, inputs or {})
        plan = self._plan(set(given), wanted)
        left = Counter(name for op in plan for name in op.inputs)
        left.update(wanted)
        values = dict(given)
        for op in plan:
            self._step(op, values, hooks)
            for name in op.inputs:
                left[name] -= 1
                if not left[name]:
                    values.pop(name, None)
        return {name: values[name] if name in values else self.constant(name) for name in wanted}

    def needed_inputs(self, wanted: Sequence[str], given: Iterable[str] = ()) -> list[str]:
        """Names of the graph inputs that `run` needs for `wanted` when the tensors `given` are fed."""
        known = set(given)
        plan = self._plan(known | {i.name for i in self._model.proto.graph.input}, wanted)
        read = {name for op in plan for name in op.inputs} | set(wanted)
        return [i.name for i in self._model.proto.graph.input if i.name in read and i.name not in self._stored]

    def reaches(self, site: Site) -> bool:
        """Whether `op_of` finds the site."""
        try:
            self.op_of(site)
        except UsageError:
            return False
        return True

    def op_of(self, site: Site) -> Op:
        """The node of a site. Raises UsageError when it is not in the main graph, or its input is not its own."""
        op = self._maker.get(site.output)
        if site.scope or op is None or len(site.splice) != 1 or site.splice[0][0] is not site.node:
            raise UsageError(f"layer {site.name!r} lies in a subgraph, a function or behind a quantiser: not handled")
        return op

    def constant(self, name: str) -> Tensor:
        """The value of a stored tensor, or of one that stored tensors alone determine."""
        if name not in self._constants:
            if name in self._stored:
                value = tensor_of(self._model.tensors.array(self._stored[name]))
                self._constants[name] = value
            else:
                op = self._maker[name]
                made = _call(op, [self.constant(n) if n else None for n in op.inputs])
                self._constants.update(made)
        return self._constants[name]

    def _step(self, op: Op, values: dict[str, Tensor], hooks: _Hooks) -> None:
        hook = hooks.of.get(id(op))
        skip = hook.port_of_weight if hook is not None else ()
        arguments = [
            None if not name or i in skip else values[name] if name in values else self.constant(name)
            for i, name in enumerate(op.inputs)
        ]
        if hook is None:
            values.update(_call(op, arguments))
        else:
            values[op.outputs[0]] = hook.apply(op, arguments)

    def _plan(self, given: set[str], wanted: Sequence[str]) -> list[Op]:
        """What to compute, in order."""
        needed, plan = set(wanted) - given, []
        for op in reversed(self.ops):
            if any(name in needed for name in op.outputs if name) and not self._fixed.issuperset(
                name for name in op.outputs if name
            ):
                plan.append(op)
                needed.update(name for name in op.inputs if name and name not in given)
        missing = sorted(n for n in needed if n not in self._maker and n not in self._stored)
        if missing:
            raise UsageError(f"the graph needs input {missing[0]!r}, which was not given")
        return plan[::-1]


class _Hook:
    def __init__(self, site: Site, product: Product | None, intercept: Intercept | None) -> None:
        self._port, self._product, self._intercept = site.splice[0][1], product, intercept
        self._k = site.k
        self.port_of_weight: tuple[int, ...] = ()

    def apply(self, op: Op, arguments: list[Tensor | None]) -> Tensor:
        x = arguments[self._port]
        assert x is not None
        x = self._intercept(x) if self._intercept else x
        if self._product is None:
            arguments[self._port] = x
            return _call(op, arguments)[op.outputs[0]]
        y = self._product(x)
        if op.kind == "MatMul":
            return y
        with torch.no_grad():  # a linear layer gives its bias for 0
            arguments[self._port] = torch.zeros((1,) * (x.ndim - 1) + (self._k,), dtype=x.dtype)
            bias = _call(op, arguments)[op.outputs[0]]
        return y + bias


class _Hooks:
    def __init__(
        self, op_of: Callable[[Site], Op], products: Mapping[Site, Product], inputs: Mapping[Site, Intercept]
    ) -> None:
        self.of: dict[int, _Hook] = {}
        for site in {**products, **inputs}:
            op = op_of(site)
            hook = _Hook(site, products.get(site), inputs.get(site))
            if site in products and op.kind == "MatMul":
                hook.port_of_weight = (1 - site.splice[0][1],)
            self.of[id(op)] = hook


def _call(op: Op, arguments: Sequence[Tensor | None]) -> dict[str, Tensor]:
    run = OPS.get(op.kind)
    if run is None:
        raise UsageError(f"operator {op.kind} (node {op.name!r}) is not handled in torch")
    result = run(op, *arguments)
    results = (result,) if isinstance(result, Tensor) else result
    return {name: value for name, value in zip(op.outputs, results, strict=False) if name and value is not None}

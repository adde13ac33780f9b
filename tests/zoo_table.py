"""Write docs/zoo.md: what each graph of the zoo gave. python tests/zoo_table.py"""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnxruntime
from test_zoo import HALF, MODELS, Outcome, compare, name

PAGE = Path(__file__).parents[1] / "docs" / "zoo.md"
INTRO = """# What each exporter's model gives

Written by `python tests/zoo_table.py`; `tests/test_zoo.py` holds each row as a test. Every graph is converted at 8:16
three ways (prune-only, fused wherever it can be, and 16:16) and run in onnxruntime {version} on the CPU beside the same
graph pruned at the same layers with stock operators. Errors are relative to the largest value of the output.

- **layers**: pruned / found; lm_head is left dense unless asked for.
- **prune**, **fused**: error with the library; **plain**: without it (the fallback functions), the larger of the two.
- **16:16**: "same" when keeping everything gave the original bit for bit, with and without the library. The exceptions
  are the fp16 graphs: ONNX Runtime's CPU provider computes them in fp32 and drops the rounding to fp16 between
  neighbouring nodes; an op between two nodes brings it back. One unit in the last place decides ties, so for these
  the error against stock operators says nothing, and each layer is checked on equal inputs instead (**checks**, which
  is `nmonnx validate` on both conversions).

- **16:16 fused**: error of the fused ops that keep everything, against the original. `NMMatMulNBits` does not round the
  activation as the original does (MatMulNBits in blocks of 32 channels, dynamic quantisation a whole tensor), and such
  a rounding may decide which channels the next layer keeps; so of these **fused** and **plain** say nothing.

| model | layers | ops | prune | fused | plain | 16:16 | 16:16 fused | checks | note |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def row(path: Path, outcome: Outcome) -> str:
    if outcome.refused:
        return f"| {name(path)} | | | | | | | | | refused: {outcome.refused.partition(' (')[0]} |"
    layers = f"{outcome.pruned.total()} / {outcome.pruned.total() + outcome.left.total()}"
    ops = ", ".join(f"{n} {op}" for op, n in sorted(outcome.pruned.items()))
    left = "; ".join(f"{n} left: {why}" for why, n in outcome.left.items() if "lm_head" not in why)
    if outcome.not_run:
        return f"| {name(path)} | {layers} | {ops} | | | | | | | converted, not run: {outcome.not_run} |"
    errors = (outcome.prune_only, outcome.fused, outcome.plain)
    cells = ["-" if name(path) in HALF else _error(e) for e in errors]
    if outcome.pruned["NMMatMulNBits"]:
        cells[1:] = ["-", "-"]
    same = "same" if outcome.same else f"fp16, {_error(outcome.dense)}"
    checks = "pass" if not outcome.faults else "FAIL"
    columns = (name(path), layers, ops, *cells, same, _error(outcome.whole), checks, left)
    return f"| {' | '.join(columns)} |"


def _error(value: float | None) -> str:
    return "0" if value == 0 else f"{value:.0e}"


def main() -> None:
    rows = []
    for path in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(path, compare(path, Path(folder))))
            print(rows[-1])
    PAGE.write_text(INTRO.format(version=onnxruntime.__version__) + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

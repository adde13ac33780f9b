"""`nmonnx inspect`: the linear layers of a model, and what could be pruned."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmonnx.commands.options import ModelPath, Quiet, ReportPath, Verbose, tell
from nmonnx.report import Report, Table, check_format, table

if TYPE_CHECKING:
    from nmonnx.sites import Found, Site


def command(model: ModelPath, report: ReportPath = None, verbose: Verbose = False, quiet: Quiet = False) -> None:
    """List the linear layers of MODEL by role, with what can be pruned and the reason where not."""
    from nmonnx.convert import converted_records
    from nmonnx.onnx_file.graph import load
    from nmonnx.sites import find_sites

    check_format(report)
    opened = load(model)
    earlier = converted_records(opened)
    if earlier is None:
        tell(inspection(model, opened.opset, find_sites(opened), verbose), report, quiet)
    else:
        tell(conversion_of(model, earlier, verbose), report, quiet)


def conversion_of(path: Path, records: list[dict[str, Any]], verbose: bool = False) -> Report:
    """A converted model: what its metadata says of each linear layer of the original."""
    pruned = [r for r in records if r["status"] == "pruned"]
    words = (f"converted by nmonnx: {len(pruned)} of {len(records)} linear layers pruned.",)
    groups = Counter((r["role"], r["op"], r["k"], r["n"], r["pattern"], r["kernel"]) for r in pruned)
    by_role = [(role, count, *rest) for (role, *rest), count in groups.items()]
    each = [(r["name"], r["op"], r["role"], _dash(r["block"]), r["k"], r["n"], _now(r)) for r in records]
    shown = (
        table("Layers", ("layer", "op", "role", "block", "K", "N", "now"), each)
        if verbose
        else table("Pruned layers", ("role", "layers", "was", "K", "N", "pattern", "now"), by_role)
    )
    return Report(str(path), words, (shown,), {"command": "inspect", "converted": records}, (path,))


def _now(record: dict[str, Any]) -> str:
    left = record["status"] != "pruned"
    return f"left: {record['reason']}" if left else f"{record['kernel']} {record['pattern']}"


def inspection(path: Path, opset: int, found: Found, verbose: bool = False) -> Report:
    """The layers by role, or one by one."""
    left = [s for s in found.skipped if s.linear]
    other = len(found.skipped) - len(left)
    total = len(found.sites) + len(left)
    words = (
        f"{total} linear layers with a constant weight, {len(found.sites)} can be pruned;"
        f" {other} other matrix products are no layers. Opset {opset}.",
    )
    tables = (_each(found),) if verbose else (_by_role(found), _reasons(found))
    data = {
        "command": "inspect",
        "sites": [_record(s) for s in found.sites],
        "skipped": [asdict(s) for s in found.skipped],
    }
    return Report(str(path), words, tables, data, (path,))


def _record(site: Site) -> dict[str, Any]:
    fields = ("name", "scope", "op", "role", "block", "k", "n", "elem", "initializer", "kernel", "not_fusable")
    return {f: getattr(site, f) for f in fields} | {"activation": site.activation.name}


def _by_role(found: Found) -> Table:
    groups = Counter((s.role, s.op, s.k, s.n, s.kernel) for s in found.sites)
    rows = [(role, count, op, k, n, kernel) for (role, op, k, n, kernel), count in groups.items()]
    return table("Layers that can be pruned", ("role", "layers", "op", "K", "N", "can become"), rows)


def _reasons(found: Found) -> Table:
    groups = Counter((s.op, "linear" if s.linear else "no layer", s.reason) for s in found.skipped)
    rows = [(count, op, kind, reason) for (op, kind, reason), count in groups.items()]
    return table("Left as they are", ("nodes", "op", "kind", "reason"), rows)


def _each(found: Found) -> Table:
    rows: list[tuple[object, ...]] = [(s.name, s.op, s.role, _dash(s.block), s.k, s.n, _kernel(s)) for s in found.sites]
    rows += [(s.name, s.op, s.role, _dash(s.block), _dash(s.k), _dash(s.n), f"left: {s.reason}") for s in found.skipped]
    return table("Layers", ("layer", "op", "role", "block", "K", "N", "can become"), rows)


def _kernel(site: Site) -> str:
    return f"NMPrune: {site.not_fusable}" if site.kernel == "NMPrune" else site.kernel


def _dash(value: int | None) -> str:
    return "-" if value is None else str(value)

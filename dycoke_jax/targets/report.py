"""Shows what compilers said: as tables and as values for JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from jax.sharding import Mesh
from rich.table import Table

from dycoke_jax.bench.report import seconds, size
from dycoke_jax.compression.methods import described
from dycoke_jax.targets.hlo import Collective
from dycoke_jax.targets.run import Result, StageResult
from dycoke_jax.targets.topology import Target

WIDTH = 150
"""Width that the tables need, in characters."""


def headline(preset: str, target: Target, mesh: Mesh | None, chosen: bool) -> str:
    """What is compiled for what, in lines.

    Args:
        preset: name of the model.
        target: what is compiled for.
        mesh: the mesh, or None.
        chosen: whether the mesh was chosen here, and not by the user.
    """
    chip = target.chip
    where = "one device, without a mesh"
    if mesh is not None:
        where = "mesh " + ", ".join(f"{name}={count}" for name, count in mesh.shape.items())
        where += " (chosen; see --mesh)" if chosen else ""
    return (
        f"{preset} on {target.name}, {where}: compiled, not run; all figures are of one device\n"
        f"a device has {size(chip.memory)}, {size(chip.bandwidth)}/s, {chip.flops / 1e12:.0f} "
        f"TFLOP/s in bfloat16 and sends {size(chip.links)}/s ({chip.source})"
    )


def memory(result: Result, target: Target) -> Table:
    """A table of the memory of each stage."""
    table = Table(title=f"Memory, {_title(result)}", title_justify="left")
    columns = ["weights", "cache", "others", "temporaries", "code", "together", "of", "fits"]
    _columns(table, ["stage"], [*columns, "compiled in"])
    for stage in result.stages:
        if stage.compiled is None:
            table.add_row(stage.name, *[""] * 6, size(target.chip.memory), "no", "")
            continue
        of = stage.compiled.memory
        sizes = (of.weights, of.cache, of.others, of.temporaries, of.code, of.total)
        table.add_row(
            stage.name,
            *(size(each) if each else "" for each in sizes),
            size(target.chip.memory),
            "yes" if stage.fits else "no",
            seconds(stage.compiled.seconds),
        )
    return table


def work(result: Result) -> Table:
    """A table of what a run of each stage does, and the least time for it."""
    table = Table(
        title="A run of each program: operations by shapes and by the compiler; bytes counted from "
        "its instructions and by the compiler; least time, and what bounds it",
        title_justify="left",
    )
    numbers = ["runs", "GFLOP", "compiler", "bytes", "compiler", "sent", "least time"]
    _columns(table, ["program"], numbers)
    table.add_column("bound by", no_wrap=True)
    for stage in result.stages:
        if stage.compiled is None or stage.limit is None:
            continue
        of = stage.compiled.costs
        sent = sum(each.sent for each in of.traffic.collectives)
        table.add_row(
            "decode step" if stage.name == "decode" else stage.name,
            str(stage.runs),
            _giga(stage.flops),
            "" if not of.flops or of.flops < 0 else _giga(of.flops),
            size(of.traffic.bytes),
            "" if of.compiler_bytes is None else size(of.compiler_bytes),
            size(sent) if sent else "",
            seconds(stage.limit.seconds),
            stage.limit.bound,
        )
    return table


def lines(result: Result) -> list[str]:
    """What else there is to say of a result, in lines."""
    said = []
    for stage in result.stages:
        if stage.reason:
            said.append(stage.reason)
        if stage.compiled is None:
            continue
        traffic = stage.compiled.costs.traffic
        of_kinds = ", ".join(
            f"{entry['count']} {entry['kind']} ({size(entry['bytes'])})"
            for entry in by_kind(traffic.collectives)
        )
        said.append(f"collectives of {stage.name}: {of_kinds or 'none'}")
        for choice in traffic.choices:
            said.append(
                f"  not counted, {_branch(choice.origin)} of {stage.name}: {size(choice.extra)} "
                f"more, {len(choice.collectives)} collectives"
            )
        if stage.name == "decode":
            said.append(
                f"updated in place: {size(stage.compiled.aliased)} of {size(result.state)} of the "
                f"state, of which {size(result.cache)} are caches"
            )
    if result.largest is not None:
        how = "compiled" if result.largest.confirmed else "by arithmetic, not compiled"
        said.append(f"largest batch: {result.largest.batch} ({how})")
    return said


def by_kind(collectives: Sequence[Collective]) -> list[dict[str, Any]]:
    """Number, bytes of the results and bytes that are sent, of each kind of collective."""
    kinds: dict[str, dict[str, Any]] = {}
    for each in collectives:
        entry = kinds.setdefault(
            each.kind, {"kind": each.kind, "count": 0, "bytes": 0, "sent": 0.0}
        )
        entry["count"] += each.times
        entry["bytes"] += each.bytes * each.times
        entry["sent"] += each.sent
    return list(kinds.values())


def as_json(
    preset: str, target: Target, mesh: Mesh | None, results: Sequence[Result]
) -> dict[str, Any]:
    """All results as values that JSON can hold: seconds, bytes and operations of one device."""
    chip = asdict(target.chip)
    del chip["gpu"], chip["cores"]
    return {
        "preset": preset,
        "target": target.name,
        "chip": chip,
        "mesh": None if mesh is None else dict(mesh.shape),
        "results": [_entry(result) for result in results],
    }


def _entry(result: Result) -> dict[str, Any]:
    work, compression = result.work, result.work.compression
    return {
        "compression": result.name,
        "settings": None if compression is None else described(compression),
        "batch": work.batch,
        "rows": result.rows,
        "frames": work.frames,
        "dtype": work.dtype,
        "weights": work.weights,
        "kv": work.kv,
        "fsdp": work.fsdp,
        "layers": work.config.text.num_layers,
        "slots": list(result.slots),
        "cache": result.cache,
        "state": result.state,
        "fits": result.fits,
        "largest": None if result.largest is None else asdict(result.largest),
        "stages": [_of_stage(stage) for stage in result.stages],
    }


def _of_stage(stage: StageResult) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": stage.name,
        "runs": stage.runs,
        "fits": stage.fits,
        "reason": stage.reason,
    }
    if stage.compiled is None or stage.limit is None:
        return entry
    costs = stage.compiled.costs
    return entry | {
        "seconds": stage.compiled.seconds,
        "memory": asdict(stage.compiled.memory) | {"total": stage.compiled.memory.total},
        "flops": {"shapes": stage.flops, "compiler": costs.flops},
        "bytes": {"counted": costs.traffic.bytes, "compiler": costs.compiler_bytes},
        "aliased": stage.compiled.aliased,
        "collectives": [asdict(each) for each in costs.traffic.collectives],
        "choices": [asdict(each) for each in costs.traffic.choices],
        "limit": asdict(stage.limit),
    }


def _title(result: Result) -> str:
    rows = f", {result.rows} rows" if result.rows != result.work.batch else ""
    return f"{result.name}, batch {result.work.batch}{rows}, {result.work.frames} frames"


def _branch(origin: str) -> str:
    """What a conditional is for."""
    if "kv_pruning" in origin:
        return "choosing anew (KV pruning)"
    return "sampling by temperature" if origin.endswith("/cond") else "another branch"


def _giga(flops: float) -> str:
    return f"{flops / 1e9:,.1f}"


def _columns(table: Table, names: Sequence[str], numbers: Sequence[str]) -> None:
    for name in names:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)

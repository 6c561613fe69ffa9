"""Shows results: as tables, as values for JSON and as a plot."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from dycoke_jax.bench.measure import Spread
from dycoke_jax.bench.memory import Peak
from dycoke_jax.bench.results import Results, Row
from dycoke_jax.bench.stages import STAGES
from dycoke_jax.compression.methods import described
from dycoke_jax.files import write_file

WIDTH = 200
"""Width that the tables need, in characters."""


def as_json(results: Results) -> dict[str, Any]:
    """All results as values that JSON can hold: seconds, bytes and operations."""
    whole = asdict(results)
    for entry, row in zip(whole["rows"], results.rows, strict=True):
        combination = row.combination
        compression = combination.compression
        entry["combination"] = {
            "batch": combination.batch,
            "frames": combination.frames,
            "compression": combination.name,
            "weights": combination.weights,
            "kv": combination.kv,
            "settings": None if compression is None else described(compression),
        }
    return whole


def headline(results: Results) -> str:
    """What was measured where, in two lines."""
    machine = results.machine
    device = machine["processor"] if machine["platform"] == "cpu" else machine["device"]
    return (
        f"{results.model}, {machine['dtype']}, {size(results.weights)} of weights, on {device} "
        f"({machine['platform']}, cores: {machine['cores']}), jax {machine['jax']}: medians of "
        f"{results.rounds} interleaved rounds, {results.new_tokens} new tokens\n"
        f"the machine in the same rounds: {_spread(results.matrix, 1e9)} GFLOP/s of a matrix "
        f"product, {_spread(results.bandwidth, 1e9)} GB/s read from memory (median, quartiles)"
    )


def times(results: Results) -> Table:
    """A table with the median times of each combination, one a row, and its peak memory."""
    stages = [name for name in STAGES if any(name in row.stages for row in results.rows)]
    saves = any(row.of_saved is not None for row in results.rows)
    table = Table(
        title="Medians of the times"
        + ("; the token stage as a share of the prefill that it saves" if saves else "")
        + "; peak memory of the whole process or device, and how far it is above what was in use "
        "before (weights are not in it); programs that were compiled, or found in the compilation "
        "cache",
        title_justify="left",
    )
    shares = ["of saved"] if saves else []
    columns = ["kept", *map(_title, stages), "tokens/s", *shares, "peak", "above", "programs"]
    _add_columns(table, ["batch", "frames"], ["compression"], columns)
    for row in results.rows:
        counts, compiled = row.counts, row.compiled
        medians = {name: stage.spread.median for name, stage in row.stages.items()}
        share = "" if row.of_saved is None else f"{_digits(100 * row.of_saved)} %"
        table.add_row(
            *_names(row),
            "" if counts is None else f"{counts.merged:,} of {counts.visual:,}",
            *_times(medians, stages, row.combination.batch),
            *([share] if saves else []),
            *_memory(row.peak),
            f"{compiled.compiled} compiled, {compiled.found} found, {seconds(compiled.seconds)}",
        )
    for theirs in results.theirs:
        medians = {name: found.median for name, found in theirs.stages.items()}
        names = str(theirs.batch), str(theirs.frames), "transformers", ""
        cells = [*_times(medians, stages, theirs.batch), *([""] if saves else [])]
        table.add_row(*names, *cells, *_memory(theirs.peak), "")
    return table


def limits(results: Results) -> Table:
    """A table of all stages: their spread, the limit of the machine, and transformers."""
    table = Table(
        title="Stages against the limits of the machine: above 100 % where the processor's caches "
        "hold what is read",
        title_justify="left",
    )
    columns = ["median", "quartiles", "GFLOP", "moved", "least time", "bound by", "share"]
    if results.theirs:
        columns.append("faster than transformers")
    _add_columns(table, ["batch", "frames"], ["compression", "stage"], columns)
    for row in results.rows:
        for number, (name, stage) in enumerate(row.stages.items()):
            found, cost = stage.spread, stage.cost
            cells = [
                *(_names(row) if number == 0 else ("", "", "")),
                _title(name),
                seconds(found.median),
                f"{seconds(found.low)} .. {seconds(found.high)}",
                _digits(cost.flops / 1e9) if cost and cost.flops else "",
                size(cost.bytes) if cost else "",
                seconds(stage.limit.seconds),
                stage.limit.bound,
                f"{100 * stage.share:.0f} %",
            ]
            if results.theirs:
                cells.append("" if stage.faster is None else f"{_spread(stage.faster)}x")
            table.add_row(*cells, end_section=number + 1 == len(row.stages))
    return table


def agreement(results: Results) -> list[str]:
    """Lines that say how many tokens of the plain model are those of transformers."""
    lines = []
    for row in results.rows:
        if row.same_ids is not None:
            same, count = row.same_ids
            batch, frames, label = _names(row)
            lines.append(
                f"batch {batch}, {frames} frames, {label}: {same} of {count} greedy tokens are "
                "those of transformers, up to the first that differs"
            )
    return lines


def plot(results: Results, path: Path) -> None:
    """Draws time and memory against frames and against batch size, as a PNG file.

    The time is that of the whole run, or without it the sum of the stages that were measured.

    Args:
        results: the results.
        path: the file to write.

    Raises:
        OutputError: if the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    parts = figure.subplots(2, 2)
    for line, axis, other in ((0, "frames", "batch"), (1, "batch", "frames")):
        for name, members in _lines(results.rows, other).items():
            members = sorted(members, key=lambda row: getattr(row.combination, axis))
            x = [getattr(row.combination, axis) for row in members]
            found = [_whole_time(row, results.new_tokens) for row in members]
            middle = [each.median for each in found]
            below = [each.median - each.low for each in found]
            above = [each.high - each.median for each in found]
            drawn = {"marker": "o", "label": name}
            parts[line, 0].errorbar(x, middle, yerr=[below, above], capsize=2, **drawn)
            peaks = [row.peak.above / 1e9 if row.peak else float("nan") for row in members]
            parts[line, 1].plot(x, peaks, **drawn)
        parts[line, 0].set(xlabel=axis, ylabel="time, s (median and quartiles)")
        parts[line, 1].set(xlabel=axis, ylabel="peak memory above what was in use before, GB")
        parts[line, 1].legend(fontsize="small")
        for part in parts[line]:
            part.set_xticks(sorted({getattr(row.combination, axis) for row in results.rows}))
            part.grid(alpha=0.3)
            part.set_ylim(bottom=0)
    figure.suptitle(headline(results), fontsize="small", wrap=True)
    png = BytesIO()
    figure.savefig(png, format="png", dpi=120)
    write_file(path, png.getvalue())


def seconds(value: float) -> str:
    """A time with three digits and its unit."""
    return _in_units(value, (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)))


def size(count: float) -> str:
    """A number of bytes with three digits and its unit."""
    return _in_units(count, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)))


def _lines(rows: Sequence[Row], other: str) -> dict[str, list[Row]]:
    """Rows by what the lines of the plot differ in: compression and ``other``."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        name = f"{row.combination.label}, {other} {getattr(row.combination, other)}"
        lines.setdefault(name, []).append(row)
    return lines


def _whole_time(row: Row, new_tokens: int) -> Spread:
    if "end to end" in row.stages:
        return row.stages["end to end"].spread
    parts = {name: 1 for name in row.stages if name != "token stage"}
    if "decode" in parts:
        parts["decode"] = new_tokens - 1
    of = {name: row.stages[name].spread for name in parts}
    return Spread(
        sum(count * of[name].median for name, count in parts.items()),
        sum(count * of[name].low for name, count in parts.items()),
        sum(count * of[name].high for name, count in parts.items()),
    )


def _names(row: Row) -> tuple[str, str, str]:
    combination = row.combination
    return str(combination.batch), str(combination.frames), combination.label


def _title(stage: str) -> str:
    return "decode/step" if stage == "decode" else stage


def _add_columns(
    table: Table, first: Sequence[str], names: Sequence[str], rest: Sequence[str]
) -> None:
    for column in (*first, *names, *rest):
        justify: Literal["left", "right"] = "left" if column in names else "right"
        table.add_column(column, justify=justify, no_wrap=True)


def _times(medians: Mapping[str, float], stages: Sequence[str], batch: int) -> list[str]:
    """The cells of the stages, and of the tokens a second of decoding."""
    cells = [seconds(medians[name]) if name in medians else "" for name in stages]
    return [*cells, _digits(batch / medians["decode"]) if "decode" in medians else ""]


def _memory(peak: Peak | None) -> tuple[str, str]:
    return ("", "") if peak is None else (size(peak.whole), size(peak.above))


def _spread(values: Spread, unit: float = 1.0) -> str:
    low, median, high = (_digits(x / unit) for x in (values.low, values.median, values.high))
    return f"{median} ({low} .. {high})"


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:#.3g}"


def _in_units(value: float, units: Sequence[tuple[str, float]]) -> str:
    """A value in the largest unit of which it is at least one; else in the smallest."""
    unit, size = next((each for each in units if value >= each[1]), units[-1])
    return f"{_digits(value / size)} {unit}"

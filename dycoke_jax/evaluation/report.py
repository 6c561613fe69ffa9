"""Reads and writes results of an evaluation, and shows them as a table and as a plot."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from rich.table import Table

from dycoke_jax.errors import ConfigError, OutputError
from dycoke_jax.evaluation.accuracy import Result, Tally
from dycoke_jax.evaluation.settings import Comparison
from dycoke_jax.files import write_file
from dycoke_jax.tasks.questions import KINDS

_PARAMETER = re.compile(r"[A-Z]=[^=]+")
WIDTH = 210
"""Width that the table of ``table`` needs, in characters."""
_COLOURS = 10
"""Lines of a plot that matplotlib gives different colours."""
_MARKERS = "os^D"
"""Markers of the first so many lines, and of those that have the same colours again."""


def as_json(result: Result) -> dict[str, Any]:
    """The result of one setting as values that JSON can hold.

    They are token counts, and accuracies with confidence intervals, of all questions and by kind.
    """
    return {
        "visual": result.visual,
        "merged": result.merged,
        "read": result.read,
        "attended": result.attended,
        "all": _scores(result.whole),
        "kinds": {kind: _scores(tally) for kind, tally in sorted(result.kinds.items())},
    }


def from_json(name: str, entry: Mapping[str, Any]) -> Result:
    """The result of the setting ``name`` from the values that ``as_json`` returned."""
    result = Result(name, visual=entry["visual"], merged=entry["merged"])
    result.read, result.attended = entry["read"], entry["attended"]
    for kind, scores in entry["kinds"].items():
        result.kinds[kind] = Tally(scores["right"], scores["asked"])
    return result


def _scores(tally: Tally) -> dict[str, Any]:
    return asdict(tally) | {"accuracy": tally.accuracy, "interval": tally.interval}


def read(path: Path, described: Mapping[str, Any]) -> dict[str, Result]:
    """Reads the results of an earlier, possibly unfinished run of the same evaluation.

    Args:
        path: the file of results.
        described: the description of the evaluation: all that decides its results apart from the
            compression settings. It must equal the one in the file.

    Returns:
        Results by the names of their settings; none if there is no file.

    Raises:
        ConfigError: if the file holds the results of another evaluation.
        OutputError: if the file cannot be read.
    """
    if not path.exists():
        return {}
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        before, entries = saved["evaluation"], saved["settings"]
        results = {name: from_json(name, entry) for name, entry in entries.items()}
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(
            f"{path} holds no results of an evaluation; remove it or name another file"
        ) from error
    if before != described:
        changed = [key for key in described if before.get(key) != described[key]]
        raise ConfigError(
            f"{path} holds results of another evaluation ({', '.join(changed)}); name another file"
        )
    return results


def write(
    path: Path,
    described: Mapping[str, Any],
    results: Mapping[str, Result],
    blind: Mapping[str, float],
) -> None:
    """Writes all results to a file; if that fails, an existing file is left as it is.

    Args:
        path: the file.
        described: the description of the evaluation, as for ``read``.
        results: results by the names of their settings.
        blind: share of right answers of the best guess without the clip, by kind of question.

    Raises:
        OutputError: if the file cannot be written.
    """
    write_file(path, json.dumps(everything(described, results, blind), indent=1).encode() + b"\n")


def everything(
    described: Mapping[str, Any], results: Mapping[str, Result], blind: Mapping[str, float]
) -> dict[str, Any]:
    """All results as values that JSON can hold; the arguments are those of ``write``."""
    settings = {name: as_json(result) for name, result in results.items()}
    return {"evaluation": described, "settings": settings, "blind": blind}


def table(
    results: Sequence[Result],
    blind: Mapping[str, float],
    headings: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Table:
    """A table of accuracies in per cent: a row for each setting, and one for the blind guess.

    The cell of a kind of question is empty if no question of that kind was asked.

    Args:
        results: at least one result; column "lost" compares the others with the first.
        blind: share of right answers of the best guess without the clip, by kind of question.
        headings: headings above settings by their names; rows of one heading follow each other.
        notes: lines below the table.
    """
    rows = Table(caption="\n".join(notes) or None, caption_justify="left")
    rows.add_column("setting", no_wrap=True)
    for column in ("tokens", "read", "attended", "all", "95 %", "lost", *KINDS):
        rows.add_column(column, justify="right", no_wrap=True)
    full, heading = results[0].whole.accuracy, ""
    for result in results:
        whole, (low, high) = result.whole, result.whole.interval
        above = (headings or {}).get(result.name, "")
        if above != heading:
            heading = above
            rows.add_section()
            rows.add_row(heading, style="bold")
        rows.add_row(
            result.name,
            f"{result.merged:.0f}",
            f"{result.read:.0f}",
            f"{result.attended:.0f}",
            f"{100 * whole.accuracy:.1f}",
            f"{100 * low:.1f}-{100 * high:.1f}",
            f"{100 * (full - whole.accuracy):.1f}",
            *(
                _percent(result.kinds[kind].accuracy) if kind in result.kinds else ""
                for kind in KINDS
            ),
        )
    asked = {kind: tally.asked for kind, tally in results[0].kinds.items()}
    whole_blind = sum(blind[kind] * count for kind, count in asked.items()) / sum(asked.values())
    chance = (_percent(blind[kind]) if kind in blind else "" for kind in KINDS)
    rows.add_section()
    rows.add_row("blind guess", "0", "0", "0", f"{100 * whole_blind:.1f}", "", "", *chance)
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def check_plot() -> None:
    """Checks that matplotlib, an optional dependency, is installed.

    Raises:
        ConfigError: if it is not.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError('the plot needs matplotlib: pip install "dycoke_jax[plot]"')


def plot(
    results: Sequence[Result],
    path: Path,
    lines: Mapping[str, Sequence[str]],
    frames: Mapping[str, int] | None = None,
) -> None:
    """Draws accuracy against numbers of visual tokens, and writes the plot as a PNG file.

    The left part has the tokens that a layer reads in prefill, the right part those that the pruned
    layers attend to in a decode step. With ``frames`` there is one part, against their numbers.

    Args:
        results: results with different names.
        path: the file to write.
        lines: the settings of each line, by its label.
        frames: number of frames that each setting samples, where they differ.

    Raises:
        ConfigError: if matplotlib is not installed.
        OutputError: if the file cannot be written.
    """
    check_plot()
    from matplotlib.figure import Figure

    axes_of: dict[str, Callable[[Result], float]] = {
        "visual tokens that a layer reads in prefill (mean)": lambda result: result.read,
        "visual tokens attended to per decode step (mean)": lambda result: result.attended,
    }
    if frames is not None:
        axes_of = {"frames sampled of a clip": lambda result: frames[result.name]}
    figure = Figure(figsize=(3 + 5 * len(axes_of), 4.5), layout="constrained")
    parts = figure.subplots(1, len(axes_of), sharey=True, squeeze=False)[0]
    by_name = {result.name: result for result in results}
    for part, (title, of_result) in zip(parts, axes_of.items(), strict=True):
        for number, (label, names) in enumerate(lines.items()):
            ordered = sorted((by_name[name] for name in names), key=of_result)
            x = [of_result(result) for result in ordered]
            y = [100 * result.whole.accuracy for result in ordered]
            ends = [[100 * end for end in result.whole.interval] for result in ordered]
            below = [y_ - low for y_, (low, _) in zip(y, ends, strict=True)]
            above = [high - y_ for y_, (_, high) in zip(y, ends, strict=True)]
            marker = _MARKERS[number // _COLOURS % len(_MARKERS)]
            part.errorbar(x, y, yerr=[below, above], marker=marker, capsize=2, label=label)
        part.set(xlabel=title)
        part.grid(alpha=0.3)
    parts[0].set(ylabel="right answers, %")
    labels = parts[-1].get_legend_handles_labels()
    figure.legend(*labels, loc="outside right upper", fontsize="small")
    png = BytesIO()
    figure.savefig(png, format="png", dpi=120)
    write_file(path, png.getvalue())


def lines_of(comparison: Comparison) -> dict[str, list[str]]:
    """The lines of the plot: the names of the settings of each method, by its label.

    Where the number of frames differs, each line begins at the first setting, of whole frames.
    """
    if not any(setting.method for setting in comparison.settings):
        return sweeps([setting.name for setting in comparison.settings])
    first, *others = comparison.settings
    start = [first.name] if any(one.frames != first.frames for one in others) else []
    lines = {} if start else {first.name: [first.name]}
    for setting in others:
        lines.setdefault(setting.method, [*start]).append(setting.name)
    return lines


def sweeps(names: Sequence[str]) -> dict[str, list[str]]:
    """Groups settings into the lines of the plot.

    The settings of a line have the same method and differ in one parameter. Every other parameter
    has the value that is most frequent among the settings of the method.

    Args:
        names: names of settings: the words of the method, and parameters such as ``K=0.7``. A text
            such as ``random(k=0.5)`` has no such parameters.

    Returns:
        Names of settings by the label of their line. The label is the method, followed by the
        parameter that differs if the method has several lines.
    """
    methods: dict[str, list[str]] = {}
    for name in names:
        method = " ".join(word for word in name.split() if not _PARAMETER.fullmatch(word))
        methods.setdefault(method, []).append(name)
    lines = {}
    for method, members in methods.items():
        numbers = {
            name: dict(w.split("=") for w in name.split() if _PARAMETER.fullmatch(w))
            for name in members
        }
        letters = dict.fromkeys(letter for of_name in numbers.values() for letter in of_name)
        usual = {}
        for letter in letters:
            counts = Counter(of_name.get(letter) for of_name in numbers.values())
            usual[letter] = counts.most_common(1)[0][0]
        changing = [x for x in letters if len({of_name.get(x) for of_name in numbers.values()}) > 1]
        for changed in changing or [""]:
            label = f"{method}, {changed}" if len(changing) > 1 else method
            lines[label] = [
                name
                for name, of_name in numbers.items()
                if all(of_name.get(x) == usual[x] for x in letters if x != changed)
            ]
    return lines

"""Results as a file, a table and a plot."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from rich.table import Table

from dycoke_jax.errors import ConfigError, OutputError
from dycoke_jax.evaluation.accuracy import Result, Tally
from dycoke_jax.files import write_file
from dycoke_jax.tasks.questions import KINDS

WIDTH = 170
"""Columns that ``table`` needs."""


def as_json(result: Result) -> dict[str, Any]:
    """One setting: accuracy with its confidence interval in all and by kind, and token counts."""
    return {
        "visual": result.visual,
        "merged": result.merged,
        "attended": result.attended,
        "all": _scores(result.whole),
        "kinds": {kind: _scores(tally) for kind, tally in sorted(result.kinds.items())},
    }


def from_json(name: str, entry: Mapping[str, Any]) -> Result:
    """The inverse of ``as_json``."""
    result = Result(name, visual=entry["visual"], merged=entry["merged"])
    result.attended = entry["attended"]
    for kind, scores in entry["kinds"].items():
        result.kinds[kind] = Tally(scores["right"], scores["asked"])
    return result


def _scores(tally: Tally) -> dict[str, Any]:
    return asdict(tally) | {"accuracy": tally.accuracy, "interval": tally.interval}


def read(path: Path, described: Mapping[str, Any]) -> dict[str, Result]:
    """Settings that an earlier evaluation of the same kind has finished; none without a file.

    Args:
        path: of the file.
        described: what decides the results besides the settings.

    Raises:
        ConfigError: when the file holds another evaluation's results.
        OutputError: when it cannot be read.
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
    """Writes all results, whole or not at all.

    Raises:
        OutputError: if the file cannot be written.
    """
    write_file(path, json.dumps(everything(described, results, blind), indent=1).encode() + b"\n")


def everything(
    described: Mapping[str, Any], results: Mapping[str, Result], blind: Mapping[str, float]
) -> dict[str, Any]:
    """All results for machines; ``blind`` as for ``table``."""
    settings = {name: as_json(result) for name, result in results.items()}
    return {"evaluation": described, "settings": settings, "blind": blind}


def table(results: Sequence[Result], blind: Mapping[str, float]) -> Table:
    """Accuracy in per cent: a row a setting, and the blind guesser's below.

    Args:
        results: the first one is what the others are compared with.
        blind: share of right answers of who never sees a clip, by kind. Few clips may leave kinds
            of questions unasked: their places stay empty.
    """
    shown = Table()
    shown.add_column("setting", no_wrap=True)
    for column in ("tokens", "attended", "all", "95 %", "lost", *KINDS):
        shown.add_column(column, justify="right", no_wrap=True)
    full = results[0].whole.accuracy
    for result in results:
        whole, (low, high) = result.whole, result.whole.interval
        shown.add_row(
            result.name,
            f"{result.merged:.0f}",
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
    shown.add_row("blind guess", "0", "0", f"{100 * whole_blind:.1f}", "", "", *chance)
    return shown


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def check_plot() -> None:
    """Raises ConfigError where matplotlib, an optional dependency, is not installed."""
    if find_spec("matplotlib") is None:
        raise ConfigError('the plot needs matplotlib: pip install "dycoke_jax[plot]"')


def plot(results: Sequence[Result], path: Path) -> None:
    """Draws accuracy against visual tokens: those that enter, and those attended to per step.

    Raises:
        ConfigError: where matplotlib is not installed.
        OutputError: if the file cannot be written.
    """
    check_plot()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    by_name = {result.name: result for result in results}
    for name, names in sweeps(list(by_name)).items():
        members = [by_name[member] for member in names]
        for axes, of_result in ((left, _merged), (right, _attended)):
            ordered = sorted(members, key=of_result)
            x = [of_result(result) for result in ordered]
            y = [100 * result.whole.accuracy for result in ordered]
            ends = [[100 * end for end in result.whole.interval] for result in ordered]
            below = [y_ - low for y_, (low, _) in zip(y, ends, strict=True)]
            above = [high - y_ for y_, (_, high) in zip(y, ends, strict=True)]
            axes.errorbar(x, y, yerr=[below, above], marker="o", capsize=2, label=name)
    left.set(xlabel="visual tokens that enter the language model", ylabel="right answers, %")
    right.set(xlabel="visual tokens attended to per decoding step (mean)")
    right.legend(fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    png = BytesIO()
    figure.savefig(png, format="png", dpi=120)
    write_file(path, png.getvalue())


def sweeps(names: Sequence[str]) -> dict[str, list[str]]:
    """Settings that belong on one line: of one method, all numbers but one alike.

    Args:
        names: words, and numbers such as ``K=0.7``; what most settings of a method have is its
            usual number.

    Returns:
        Names by the label of their line: the method, and which number changes where several do.
    """
    methods: dict[str, list[str]] = {}
    for name in names:
        method = " ".join(word for word in name.split() if "=" not in word)
        methods.setdefault(method, []).append(name)
    lines = {}
    for method, members in methods.items():
        numbers = {name: dict(w.split("=") for w in name.split() if "=" in w) for name in members}
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


def _merged(result: Result) -> float:
    return result.merged


def _attended(result: Result) -> float:
    return result.attended

"""Clips, prompts and scores of Daily-Omni, as the benchmark has them for models without sound."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Document = Mapping[str, Any]


def doc_to_visual(doc: Document) -> list[str]:
    """Returns the path of the clip, where lmms-eval unpacks the data set."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    name = doc["video_id"]
    return [str(home / "daily_omni" / "Videos" / name / f"{name}_video.mp4")]


def doc_to_text(doc: Document) -> str:
    """Returns the prompt of the benchmark's own script for models that only see.

    There the choices are printed as a list of Python, and the text stands before the clip; here the
    clip comes first, since LLaVA's models were trained so.
    """
    return (
        "\nYour task is to accurately answer multiple-choice questions based on the given video.\n"
        "Select the single most accurate answer from the given choices.\n"
        f"Question: {doc['Question']}\n"
        f"Choices: {list(doc['Choice'])}\n"
        "Your answer should be a capital letter representing your choice: A, B, C, or D. "
        "Don't generate any other text.\n"
    )


def process_results(doc: Document, results: Sequence[str]) -> dict[str, float | None]:
    """Scores an answer: its first letter counts, as in the benchmark's own scripts.

    Returns:
        1 or 0 by the names of the metrics; None for clips of the other length.
    """
    right = float(results[0].strip().upper()[:1] == doc["Answer"].upper())
    return {
        "daily_omni_accuracy": right,
        "daily_omni_accuracy_30s": right if doc["video_duration"] == "30s" else None,
        "daily_omni_accuracy_60s": right if doc["video_duration"] == "60s" else None,
    }


def mean_of_asked(scores: Sequence[float | None]) -> float:
    """Returns the mean of the scores that are not None; NaN if there are none."""
    asked = [score for score in scores if score is not None]
    return sum(asked) / len(asked) if asked else float("nan")

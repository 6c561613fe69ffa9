"""What the plug-in uses of lmms-eval, for tests that run where lmms-eval is not installed.

The behaviour is that of lmms-eval 0.7.3, its fault with pairs included. ``.ci/lmms`` tests the
plug-in with the real one.
"""

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclass
class GenerationResult:
    text: Any
    token_counts: TokenCounts | None = None


def unwrap_generation_output(output: Any) -> tuple[Any, TokenCounts | None]:
    """A result's text and counts; what is neither a text nor a list of texts is made a text."""
    if isinstance(output, GenerationResult):
        return output.text, output.token_counts
    if isinstance(output, list) and all(isinstance(part, str) for part in output):
        return output, None
    return str(output), None


class Lmms:
    """The base class of models."""

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}


@dataclass
class Instance:
    """A request; ``args`` is what lmms-eval gives a model."""

    args: tuple[Any, ...]


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str


class Logger:
    """In place of loguru's: keeps what is logged."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def warning(self, line: str) -> None:
        self.lines.append(f"warning: {line}")

    def error(self, line: str) -> None:
        self.lines.append(f"error: {line}")


def install(monkeypatch: Any) -> Logger:
    """Puts the stand-in in the place of lmms-eval and loguru for one test; returns the log."""
    logger = Logger()
    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {
            "GenerationResult": GenerationResult,
            "TokenCounts": TokenCounts,
            "unwrap_generation_output": unwrap_generation_output,
        },
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "loguru": {"logger": logger},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "dycoke_jax.evaluation.lmms_eval.model", raising=False)
    return logger

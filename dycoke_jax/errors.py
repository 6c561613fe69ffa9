"""The errors that this package raises on bad input.

The message is written for the user: one line (several for a checkpoint report) that names the cause
and the remedy. The command line prints it without a traceback and exits with code 2.
"""


class DycokeError(Exception):
    """Base of every error that this package raises on bad input."""


class ConfigError(DycokeError, ValueError):
    """A configuration or setting that is invalid or not supported."""


class CheckpointError(DycokeError):
    """A checkpoint that cannot be found, read or written, or does not fit its configuration."""


class VideoError(DycokeError):
    """A file or array that cannot be read as a video clip."""


class PromptError(DycokeError, ValueError):
    """A prompt or conversation that cannot be turned into tokens."""


class RequestError(DycokeError, ValueError):
    """A combination of arguments that is not a valid request."""


class HostError(DycokeError):
    """A run in several processes that cannot go on, such as because another process has ended."""


class EngineError(DycokeError):
    """The programs of a model fail, whatever they are asked."""


class OutputError(DycokeError):
    """A result that cannot be written to its destination."""


def printable(text: str) -> str:
    """Makes a text part of a message of one line: what cannot be printed is written as in Python.

    Among that are lone surrogates, by which Python stands for bytes of a file name.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

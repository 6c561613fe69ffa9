"""Errors whose message is meant for the person at the keyboard.

Each message is one line (a checkpoint report may have several) that names the offending thing and
says what to do. The command line prints it without a traceback and exits with code 2.
"""


class DycokeError(Exception):
    """Base of every error that this package raises on bad input."""


class ConfigError(DycokeError, ValueError):
    """A configuration or setting that cannot be honoured."""


class CheckpointError(DycokeError):
    """A checkpoint that cannot be found, read or mapped."""


class VideoError(DycokeError):
    """A clip that cannot be read as video."""


class PromptError(DycokeError, ValueError):
    """A prompt or conversation that cannot be turned into tokens."""


class RequestError(DycokeError, ValueError):
    """A combination of arguments that does not make a request."""


class OutputError(DycokeError):
    """A result that cannot be written where it should go."""

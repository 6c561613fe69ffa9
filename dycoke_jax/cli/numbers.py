"""Options that take a list of whole numbers, such as ``--frames 16,32``."""

from dycoke_jax.errors import ConfigError


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """Reads a list of whole numbers.

    Args:
        option: name of the option, for the message.
        text: numbers with commas between them.

    Raises:
        ConfigError: naming the option.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"{option} is {text!r}; it must be whole numbers with commas between them, such as 1,8"
        ) from None

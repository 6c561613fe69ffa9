"""Errors of the operating system while a clip is read, which are no fault of the file."""

import errno

import av

MAY_PASS = frozenset(
    getattr(errno, name)
    for name in (
        *("EAGAIN", "EBUSY", "EINTR", "EIO", "EREMOTEIO", "EMFILE", "ENFILE", "ESTALE"),
        *("ETIMEDOUT", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "ENOTCONN", "ENOLINK"),
        *("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETRESET", "ENETUNREACH"),
    )
    if hasattr(errno, name)
)
"""Errors of the operating system after which reading the same file may work later."""


def system_error(error: BaseException | None) -> int | None:
    """Returns the number of the error of the operating system that an error comes from.

    Errors of FFmpeg are left aside although they have such numbers: its readers of containers
    return EIO for a file that ends too early.

    Returns:
        The number, as in ``errno``; None if the error comes from none.
    """
    while error is not None:
        if isinstance(error, OSError) and not isinstance(error, av.FFmpegError) and error.errno:
            return error.errno
        error = error.__cause__
    return None


def may_pass(error: BaseException) -> bool:
    """Whether an error comes from an error of the operating system that may pass by itself.

    Such are a file server that does not answer, or too many open files; a missing or a damaged file
    is not.
    """
    return system_error(error) in MAY_PASS

"""What has to be set before jax is imported, to compile for devices that are not there."""

import os


def without_devices() -> None:
    """Makes this process use the CPU alone, and compile for devices without looking for them.

    jax and the compiler of TPUs read these variables when they are imported.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Compiling again must compile, so that its time is that of the compiler.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    # The compiler's lock admits one process at a time, which is meant for real devices.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    # It says what it does not find of a real machine.
    for name, value in (
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_STDERR_LOG_LEVEL", "3"),
        ("TPU_MIN_LOG_LEVEL", "3"),
        ("TF_CPP_MIN_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(name, value)

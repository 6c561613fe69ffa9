"""What has to be set before a device is used, to compile for devices that are not there."""

import os

import jax


def without_devices() -> None:
    """Makes this process use the CPU alone, and compile for devices without looking for them.

    The variables are read by the compiler of TPUs when it is loaded.
    """
    jax.config.update("jax_platforms", "cpu")
    # Compiling again must compile, so that its time is that of the compiler.
    jax.config.update("jax_enable_compilation_cache", False)
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    # The compiler's lock admits one process at a time, which is meant for real devices.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    # It says what it does not find of a real machine.
    for name, value in (
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v6e-8"),  # any; what is compiled for is said elsewhere
        ("TPU_STDERR_LOG_LEVEL", "3"),
        ("TPU_MIN_LOG_LEVEL", "3"),
        ("TF_CPP_MIN_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(name, value)

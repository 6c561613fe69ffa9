"""Set-up of the test processes, and fixtures that several modules use."""

import os
import sys
from pathlib import Path

import hypothesis
import jaxtyping
import pytest

# Nothing in the tests may look for a hub, or for devices: the compiler of TPUs is installed.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

# jax reads its settings from the environment when it is imported, and so do processes that tests
# start. Most of the time of the tests goes into compiling, so compiled programs are kept between
# runs. The key of a stored program is the program with its flags and versions: what is found is
# what would have been compiled.
assert "jax" not in sys.modules
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dycoke_jax-tests"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Test processes share the cores: each takes its part of the threads.
    _THREADS = str(max(1, (os.cpu_count() or 1) // int(workers)))
    os.environ.setdefault("NPROC", _THREADS)  # of XLA
    os.environ.setdefault("OMP_NUM_THREADS", _THREADS)  # of torch

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("default")

MANY_MAPS = 30_000
"""Memory maps of a process after which its compiled programs are forgotten; Linux allows some
65,000, and a program holds about 150."""


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # the order below instead of xdist's


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that no process is left with them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def golden():
    """Folder of what the authors' code computes."""
    return Path(__file__).parent / "golden"


@pytest.fixture
def unchecked_types():
    """Annotations are not checked, as outside of tests: for values of a wrong type or literal."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _forget_programs():
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPS:
        sys.modules["jax"].clear_caches()


@pytest.fixture
def compilations():
    """How many programs XLA has compiled so far, of whatever function: a callable."""
    import jax  # its settings are read from the environment when it is imported

    events = []

    def listen(name, _seconds, **_):
        if name == "/jax/core/compile/backend_compile_duration":
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: len(events)
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """The same random weights in transformers and here."""
    from support.checkpoints import tiny_llava_hf
    from support.tokenizers import tiny_tokenizer
    from transformers import LlavaOnevisionForConditionalGeneration

    from dycoke_jax import LlavaVideo

    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_llava_hf(folder, deviation=0.2)
    tiny_tokenizer().save_pretrained(folder)
    reference = LlavaOnevisionForConditionalGeneration.from_pretrained(folder).eval()
    return reference, LlavaVideo.from_pretrained(folder)

import os

# Nothing in the tests may look for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import jax
import jaxtyping
import pytest

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("default")


@pytest.fixture(scope="session")
def golden():
    """Folder of what the authors' code computes."""
    from pathlib import Path

    return Path(__file__).parent / "golden"


@pytest.fixture
def unchecked_types():
    """Annotations are not checked, as outside of tests: for values of a wrong type or literal."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Each compiled program holds memory maps, of which a process may have some 65,000 on Linux."""
    yield
    jax.clear_caches()

"""Fixtures of all tests."""

import gc
import os

import keras
import pytest

if os.environ.get("KERAS_HUB_BASES"):
    import keras_hub  # noqa: F401  Before keras_t5gemma: see modeling/bases.py.

from helpers.models import make_proto, tiny_model  # noqa: E402

import keras_t5gemma as kt  # noqa: E402

# Tracing makes many objects that stay: looking for garbage took 8 % of the time.
gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="session")
def proto():
    return make_proto()


@pytest.fixture(scope="session")
def tokenizer(proto):
    return kt.Tokenizer(proto)


@pytest.fixture(scope="session", autouse=True)
def _compile_once(tmp_path_factory):
    """What one test has compiled, no other one has to, in whichever process."""
    if keras.config.backend() == "jax":
        folder = tmp_path_factory.getbasetemp()
        folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
        kt.cache_compiled_programs(folder / "programs")
        # For the processes that tests start.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "programs")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)


@pytest.fixture
def model(tokenizer):
    return tiny_model(tokenizer)


@pytest.fixture(scope="module")
def shared_model(tokenizer):
    """One model for the tests of a file that only read it."""
    keras.utils.set_random_seed(0)
    return tiny_model(tokenizer)

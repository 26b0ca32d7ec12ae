"""Failures that say which private name of a library has gone."""

import importlib

import keras
import pytest

BACKEND = keras.config.backend()


def require(owner, name, advice):
    """Fail with one sentence when a library no longer has a private name."""
    if not hasattr(owner, name):
        owner = getattr(owner, "__name__", type(owner).__name__)
        pytest.fail(f"{owner} has no {name} any more: {advice}", pytrace=False)


def private_module(name, advice):
    """A module of a library, or a failure with one sentence."""
    try:
        return importlib.import_module(name)
    except ImportError:
        pytest.fail(f"There is no module {name} any more: {advice}", pytrace=False)


def only(*backends):
    reason = f"of {' and '.join(backends)} only"
    return pytest.mark.skipif(BACKEND not in backends, reason=reason)

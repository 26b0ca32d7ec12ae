"""What must be installed, looked at before Keras is imported."""

import importlib.util
import json
import os
from pathlib import Path

BACKENDS = ("tensorflow", "jax", "torch")


def choose_backend():
    """Set KERAS_BACKEND to an installed backend where Keras would pick another.

    Keras takes KERAS_BACKEND, else what its keras.json says, else TensorFlow.

    Raises:
        ModuleNotFoundError: when no backend is installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if os.environ.get("KERAS_BACKEND"):
        return
    home = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))
    try:
        wanted = json.loads((home / "keras.json").read_text())["backend"]
    except (OSError, ValueError, KeyError, TypeError):
        wanted = "tensorflow"
    installed = [b for b in BACKENDS if importlib.util.find_spec(b)]
    if not installed:
        raise ModuleNotFoundError(
            "keras_t5gemma needs a backend: install 'keras-t5gemma[jax]', '[torch]' or "
            "'[tensorflow]'."
        )
    if wanted not in installed:
        os.environ["KERAS_BACKEND"] = installed[0]


def require_keras_hub():
    """Import KerasHub, or say how to install it."""
    try:
        import keras_hub  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "keras_hub":
            raise
        raise ModuleNotFoundError(
            "keras_t5gemma needs keras-hub: `pip install --no-deps 'keras-hub>=0.32'` "
            "(without --no-deps it brings TensorFlow, which only that backend needs).",
            name="keras_hub",
        ) from error

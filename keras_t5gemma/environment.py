"""Checks of the installation, made before Keras is imported."""

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Any

from keras_t5gemma.utils.files import read_json_file

DISTRIBUTION, UNKNOWN_VERSION = "keras-t5gemma", "0+unknown"
BACKENDS = ("tensorflow", "jax", "torch")
COMMAND, COMMAND_MODULE = "keras-t5gemma", "keras_t5gemma.cli"


def _version():
    """The version of the installation; a checkout on the path may have none."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN_VERSION


VERSION = _version()


def versions() -> dict[str, str]:
    """Versions of Python, this package, and the libraries below it that are there."""
    found = {DISTRIBUTION: VERSION, "python": platform.python_version()}
    for name in ("keras", "keras-hub", *BACKENDS):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def defers_imports() -> bool:
    """Whether `import keras_t5gemma` may leave out the package's modules.

    Only the command line may, to show its help without Keras: the process was started
    as `keras-t5gemma` or `python -m keras_t5gemma.cli`, and Keras is not loaded yet.
    """
    return "keras" not in sys.modules and is_command_line()


def is_command_line() -> bool:
    """Whether this process was started as the `keras-t5gemma` command.

    `sys.orig_argv` tells it from a child of the command, e.g. of a data loader, in
    which `multiprocessing` restores the parent's `sys.argv`.
    """
    program, arguments = sys.argv[0] if sys.argv else "", sys.orig_argv
    if program == "-m" and "-m" in arguments[:-1]:  # The module is not found yet.
        module = arguments[arguments.index("-m") + 1]
        return module == COMMAND_MODULE or module.startswith(f"{COMMAND_MODULE}.")
    return program in arguments and Path(program).stem == COMMAND


def choose_backend(backend: str | None = None) -> None:
    """Set KERAS_BACKEND, before Keras is imported.

    Keras takes KERAS_BACKEND, else the backend in its keras.json, else TensorFlow. An
    installed backend is set where Keras would take one that is missing.

    Args:
        backend: one of `BACKENDS` to use; `None` leaves the choice to Keras.

    Raises:
        ModuleNotFoundError: when no backend is installed.
        ValueError: when Keras is already loaded with a backend other than `backend`.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if backend is not None:
        _set_backend(backend)
    if os.environ.get("KERAS_BACKEND"):
        return
    home = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))
    try:
        wanted = read_json_file(home / "keras.json")["backend"]
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


def _set_backend(backend: str) -> None:
    if "keras" in sys.modules:
        import keras

        if keras.config.backend() != backend:
            raise ValueError(
                f"Keras is already loaded with the backend {keras.config.backend()!r}; "
                f"got {backend!r}. Set KERAS_BACKEND before importing Keras."
            )
    os.environ["KERAS_BACKEND"] = backend


def require_keras_hub(feature: str) -> Any:
    """Import KerasHub for a feature that needs it, and return the module.

    Args:
        feature: what needs it, the subject of the message.

    Raises:
        ModuleNotFoundError: with the command that installs it.
    """
    try:
        import keras_hub
    except ModuleNotFoundError as error:
        if error.name != "keras_hub":
            raise
        raise ModuleNotFoundError(
            f"{feature} needs keras-hub: `pip install --no-deps 'keras-hub>=0.32' "
            "regex` (without --no-deps it brings TensorFlow, which only that backend "
            "needs).",
            name="keras_hub",
        ) from error
    return keras_hub

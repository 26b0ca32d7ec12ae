"""Code that several test files share. Importing it sets the environment of a test."""

import os
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# Most of the time on JAX and TensorFlow is compilation: do less of it. `nox` sets more
# flags, which the versions that it installs have: an unknown one ends the process.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)


def xla_flags(devices):
    """`XLA_FLAGS` for a process that simulates this many devices on a CPU."""
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"

"""Output on consoles that have few characters."""

import io
import sys

import pytest

from keras_t5gemma.cli import main

pytestmark = pytest.mark.one_backend


def test_what_cannot_be_printed_is_escaped(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    assert main.main(["presets"]) == 0
    print("\u3042")
    console.flush()
    assert console.buffer.getvalue().endswith(b"\\u3042\n")

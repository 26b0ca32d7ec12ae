"""The wheel, what importing the package loads, and the files of a release."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import keras
import pytest
import yaml

import keras_t5gemma as kt
from keras_t5gemma import environment

ROOT = Path(__file__).parent.parent
# Slow to import, or installed for something else. Keras itself loads some of them.
HEAVY = (
    "datasets",
    "grain",
    "gradio",
    "huggingface_hub",
    "kagglehub",
    "keras_hub",
    "matplotlib",
    "nltk",
    "pandas",
    "pyarrow",
    "rouge_score",
    "sacrebleu",
    "sklearn",
    "tensorflow",
    "transformers",
)
_LOADED = f"""
import json, sys
import keras
before = set(sys.modules)
import keras_t5gemma
new = [name for name in {HEAVY!r} if name in sys.modules and name not in before]
print(json.dumps([new, keras_t5gemma.__version__, "tensorflow" in sys.modules]))
"""


def test_import_loads_neither_tensorflow_nor_keras_hub():
    """An installed library costs nothing until something needs it."""
    result = subprocess.run(
        # As here, without the working directory, which may have an old egg-info.
        [sys.executable, "-P", "-c", _LOADED],
        env={**os.environ, "KERAS_BACKEND": keras.config.backend()},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    new, version, has_tensorflow = json.loads(result.stdout)
    assert new == []
    assert has_tensorflow == (keras.config.backend() == "tensorflow")
    assert version == kt.__version__


@pytest.mark.one_backend
def test_version_of_an_installation_and_of_a_checkout(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"1.2 of {name}")
    assert environment._version() == "1.2 of keras-t5gemma"

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert environment._version() == "0+unknown"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy of the sources: a build leaves files in its tree."""
    pytest.importorskip("setuptools_scm")
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "keras_t5gemma", copy / "keras_t5gemma", ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps"]
        + ["--no-build-isolation", "-w", str(folder), str(copy)],
        env={**os.environ, "SETUPTOOLS_SCM_PRETEND_VERSION": "1.2.3"},
        check=True,
    )
    (file,) = folder.glob("*.whl")
    return file


@pytest.mark.one_backend
def test_wheel_has_the_package_and_nothing_else(wheel):
    assert wheel.name == "keras_t5gemma-1.2.3-py3-none-any.whl"
    assert wheel.stat().st_size < 30e6
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read("keras_t5gemma-1.2.3.dist-info/METADATA").decode()
        entry = archive.read("keras_t5gemma-1.2.3.dist-info/entry_points.txt")
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "keras_t5gemma").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == files
    assert b"keras-t5gemma = keras_t5gemma.cli.main:main" in entry
    required = re.findall(r"^Requires-Dist: ([\w-]+)(.*)$", metadata, re.M)
    always = {name for name, condition in required if "extra ==" not in condition}
    assert {"keras", "sentencepiece"} <= always
    # One command installs it: no TensorFlow on another backend, no KerasHub.
    assert not {"keras-hub", "tensorflow", "tensorflow-text", "jax", "torch"} & always


@pytest.mark.one_backend
def test_files_of_a_release_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert citation["license"] == project["license"] == "Apache-2.0"
    assert project["dynamic"] == ["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.findall(r"^## (\S+) \(.+\)$", changelog, re.M)[-1] == "0.1.0"
    workflow = (ROOT / ".github/workflows/release.yml").read_text("utf-8")
    publish = yaml.safe_load(workflow)["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}  # No stored password.
    assert "secrets." not in workflow


@pytest.mark.one_backend
def test_readme_installs_in_one_command():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) < 220
    block = re.search(r"## Try it.*?```bash\n(.*?)```", text, re.S).group(1)
    assert re.findall(r"pip install (.*)", block) == ['".[jax]" &&']

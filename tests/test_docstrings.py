"""Examples in the docstrings of public names run."""

import doctest
import inspect
import sys

import keras
import numpy as np
import pytest
from helpers import ROOT

import keras_t5gemma as kt

sys.path.insert(0, str(ROOT / "docs/builder"))
import reference  # noqa: E402

pytestmark = [
    pytest.mark.one_backend,
    pytest.mark.skipif(
        keras.config.backend() != "torch", reason="examples are run on PyTorch only"
    ),
]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
FLAGS |= doctest.IGNORE_EXCEPTION_DETAIL
# Need files, devices or a long training: guides and the README show them.
IN_GUIDES = {
    "Distillation",
    "InfoNCE",
    "PairFiles",
    "TeacherScores",
    "TextFiles",
    "TextTower",
    "adapt_gemma2",
    "adapt_to_folder",
    "cache_compiled_programs",
    "callbacks",
    "connect",
    "distribute",
    "evaluate_encoders",
    "finetune",
    "pretrain",
    "write_teacher_scores",
}


def objects(name):
    """A public name, its public methods, and the members of a public module."""
    value = getattr(kt, name)
    yield name, value
    if inspect.ismodule(value):
        for member in reference.members(name):
            yield f"{name}.{member}", getattr(value, member)
    elif inspect.isclass(value):
        for member, function in vars(value).items():
            if not member.startswith("_"):
                yield f"{name}.{member}", function


def examples():
    """`{name: docstring}` of those with examples."""
    return {
        path: doc
        for name in reference.public_names()
        for path, value in objects(name)
        if ">>> " in (doc := inspect.getdoc(value) or "")
    }


EXAMPLES = examples()


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"keras": keras, "keras_t5gemma": kt, "np": np, **vars(kt.objectives)}
    test = doctest.DocTestParser().get_doctest(EXAMPLES[name], names, name, None, 0)
    output = []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=output.append)
    assert not output, "".join(output)


def test_every_public_name_has_an_example_here_or_in_a_guide():
    shown = {name.partition(".")[0] for name in EXAMPLES}
    assert set(reference.public_names()) - shown <= IN_GUIDES
    assert IN_GUIDES <= set(reference.public_names())


def test_a_wrong_example_is_found():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "x", None, 0)
    output = []
    doctest.DocTestRunner().run(test, out=output.append)
    assert output

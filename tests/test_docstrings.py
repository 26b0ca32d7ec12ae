"""Docstrings of public names: complete, and their examples run."""

import doctest
import inspect
import operator
import re
import sys
import typing

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


# Keras calls them: they are not in the reference.
OVERRIDES = re.compile(
    r"_|(call|build|get_config|from_config|compute_output_spec|compute_output_shape"
    r"|set_model|on_\w+|train_step|test_step|compute_loss|make_\w+_function)$"
)


def objects(name):
    """A public name, its public methods, and the members of a public module."""
    value = getattr(kt, name)
    yield name, value
    if inspect.ismodule(value):
        for member in reference.members(name):
            yield f"{name}.{member}", getattr(value, member)
    elif inspect.isclass(value):
        for member, function in vars(value).items():
            if not OVERRIDES.match(member) and not inspect.isclass(function):
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


def documented():
    """`{path: object}` of the reference: public names, what they return, methods."""
    found = {}
    for name in reference.public_names():
        inner = [f"{name}.{member}" for member in reference.members(name)]
        for path in inner or [name]:
            found[path] = operator.attrgetter(path)(kt)
    for path in sum(reference.RETURNED.values(), []):
        found[path] = operator.attrgetter(path)(kt)
    for path, value in list(found.items()):
        if inspect.isclass(value):
            found |= {f"{path}.{name}": each for name, each in methods(value)}
    return {path: value for path, value in found.items() if callable(value)}


def methods(value):
    """Names and functions of a class, and of its base classes in this package."""
    for name in dir(value):
        bases = [base for base in value.__mro__ if name in vars(base)]
        ours = [base.__module__.startswith("keras_t5gemma") for base in bases]
        function = getattr(vars(bases[0])[name], "__func__", vars(bases[0])[name])
        if OVERRIDES.match(name) or not ours[0] or not inspect.isfunction(function):
            continue
        if bases[0] is not value and name not in reference.INHERITED:
            continue
        if function.__doc__ or all(ours):  # Else it has Keras's docstring.
            yield name, function


def section(doc, name):
    """Text of a section of a docstring."""
    found = re.search(rf"^{name}:\n((?:    .*\n|\n)*)", f"{doc}\n", re.M)
    return found.group(1) if found else ""


def faults(value, doc):
    """What a docstring lacks, and parameters of it that do not exist."""
    signature = inspect.signature(value)
    names = [n for n in signature.parameters if n not in ("self", "cls")]
    args, attributes = (
        {entry.strip("*") for entry in re.findall(r"^    ([\w*]+): ", text, re.M)}
        for text in (section(doc, "Args"), section(doc, "Attributes"))
    )
    found = [f"no {name}" for name in names if name not in args | attributes]
    found += [f"{name} does not exist" for name in sorted(args - set(names))]
    if inspect.isclass(value):
        return found
    source = inspect.getsource(value)
    given = section(doc, "Returns") or section(doc, "Yields")
    returns = re.search(r"^ +(return (?!None\b)\S|yield\b)", source, re.M)
    if returns and not given and signature.return_annotation is not None:
        found.append("no Returns")
    if re.search(r"^ +raise (Value|Type)Error", source, re.M) and not section(
        doc, "Raises"
    ):
        found.append("no Raises")
    return found


DOCUMENTED = documented()


def test_every_argument_result_and_error_is_documented():
    found = {
        path: wrong
        for path, value in DOCUMENTED.items()
        if (wrong := faults(value, inspect.getdoc(value) or ""))
    }
    assert found == {}
    assert len(DOCUMENTED) > 130


def test_every_class_that_is_returned_is_documented():
    classes = {value for value in DOCUMENTED.values() if inspect.isclass(value)}

    def parts(hint):
        yield hint
        for argument in typing.get_args(hint):
            yield from parts(argument)

    for path, value in DOCUMENTED.items():
        if inspect.isclass(value):
            continue
        for hint in parts(inspect.signature(value).return_annotation):
            if getattr(hint, "__module__", "").startswith("keras_t5gemma"):
                assert hint in classes, (path, hint)


def test_a_missing_argument_is_found():
    def function(a, *b, **c) -> int:
        if a:
            raise ValueError(a)
        return 1

    assert faults(function, "Title.\n\nArgs:\n    a: x.\n    d: y.") == [
        "no b",
        "no c",
        "d does not exist",
        "no Returns",
        "no Raises",
    ]
    doc = (
        "Title.\n\nArgs:\n    a: x.\n    *b: y.\n    **c: z.\n\nReturns:\n    One.\n\n"
    )
    assert faults(function, f"{doc}Raises:\n    ValueError: x.") == []


def test_a_wrong_example_is_found():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "x", None, 0)
    output = []
    doctest.DocTestRunner().run(test, out=output.append)
    assert output

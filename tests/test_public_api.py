"""Every public name is documented, and its signature annotated."""

import inspect

import keras
import pytest

import keras_t5gemma as kt

pytestmark = pytest.mark.one_backend


def public_functions():
    """`(name, function)` of public functions and of the public methods of classes."""
    for name, value in vars(kt).items():
        if name.startswith("_") or not callable(value):
            continue
        if not inspect.isclass(value):
            yield name, value
            continue
        for member, function in vars(value).items():
            function = getattr(function, "__func__", function)
            is_public = member == "__init__" or not member.startswith("_")
            if inspect.isfunction(function) and is_public:
                yield f"{name}.{member}", function


FUNCTIONS = dict(public_functions())
# Overrides of Keras's methods inherit their documentation.
INHERITED = set(dir(keras.Model)) | set(dir(keras.losses.Loss))


def test_there_are_many():
    assert len(FUNCTIONS) > 100


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature_is_annotated(name):
    signature = inspect.signature(FUNCTIONS[name])
    missing = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.name not in ("self", "cls")
        and parameter.annotation is inspect.Parameter.empty
    ]
    assert missing == []
    is_init = name.endswith(".__init__")
    assert is_init or signature.return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_is_documented(name):
    member = name.rpartition(".")[2]
    if member not in INHERITED and member != "__init__":
        assert inspect.getdoc(FUNCTIONS[name])

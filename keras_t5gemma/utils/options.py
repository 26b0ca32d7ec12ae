"""Options as dataclasses: checks, YAML, and functions with their fields as keywords.

The modules that define options import neither Keras nor a backend, so that the command
line can show its help without them.
"""

import ast
import functools
import inspect
import json
import os
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeAlias, TypeVar

from keras_t5gemma.utils.checks import one_of

PathOrName: TypeAlias = str | os.PathLike[str]
PathsOrNames: TypeAlias = PathOrName | Sequence[PathOrName]

P = ParamSpec("P")
Options = TypeVar("Options")
Result = TypeVar("Result")


def takes_options(
    options: Callable[P, Options],
) -> Callable[[Callable[[Options], Result]], Callable[P, Result]]:
    """Decorator: call a function of one options object with the fields as arguments.

    The signature is that of the dataclass, for type checkers and for `help`; the
    docstrings of its fields become the section `Args:` of the function's docstring.
    `function.__wrapped__` takes the options object.

    Args:
        options: a dataclass.
    """

    def decorate(function: Callable[[Options], Result]) -> Callable[P, Result]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Result:
            return function(options(*args, **kwargs))

        returns = inspect.signature(function).return_annotation
        signature = inspect.signature(options).replace(return_annotation=returns)
        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__doc__ = _with_arguments(inspect.getdoc(function) or "", options)
        return call

    return decorate


def _with_arguments(doc: str, options: Any) -> str:
    docs = field_docs(options)
    fill = functools.partial(
        textwrap.fill, width=84, initial_indent="    ", subsequent_indent=" " * 8
    )
    names = [name for name in inspect.signature(options).parameters if name in docs]
    lines = [fill(f"{name}: {docs[name]}") for name in names]
    before, returns, after = doc.partition("\nReturns:")
    return "\n".join([before, "Args:", *lines, returns]) + after


def field_docs(options: type | Callable[..., Any]) -> dict[str, str]:
    """Docstrings of a dataclass's fields: `{name: text}`, of its bases too.

    Python keeps no docstring below a field, so they are read from the source; without
    a source file there are none.
    """
    found: dict[str, str] = {}
    for base in reversed(inspect.getmro(typing.cast(type, options))[:-1]):
        try:
            body = _class_bodies(inspect.getsourcefile(base) or "")[base.__name__]
        except (OSError, KeyError):
            continue
        for field, doc in zip(body, body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(doc, ast.Expr)
                and isinstance(doc.value, ast.Constant)
            ):
                found[field.target.id] = " ".join(str(doc.value.value).split())
    return found


@functools.cache
def _class_bodies(path: str) -> dict[str, list[ast.stmt]]:
    module = ast.parse(Path(path).read_text(encoding="utf-8"))
    return {n.name: n.body for n in module.body if isinstance(n, ast.ClassDef)}


@functools.cache
def choices(options: type) -> dict[str, tuple]:
    """Accepted values of the fields that are annotated with `Literal` and no other.

    Returns:
        `{name: values}`; the values include `None` where the annotation does.
    """
    found = {}
    for name, hint in typing.get_type_hints(options).items():
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        members = typing.get_args(hint) if is_union else (hint,)
        values: list[Any] = []
        for member in members:
            if member is type(None):
                values.append(None)
            elif typing.get_origin(member) is typing.Literal:
                values += typing.get_args(member)
            else:
                break
        else:
            found[name] = tuple(values)
    return found


def check_choices(options: Any) -> None:
    """Raise `ValueError` for a value that its `Literal` annotation does not list."""
    for name, accepted in choices(options.__class__).items():
        one_of(getattr(options, name), name, accepted)


def as_json(options: dict[str, Any]) -> dict[str, Any]:
    """Options as JSON values: paths and functions become text, tuples lists."""
    return json.loads(json.dumps(options, default=_as_text))


def _as_text(value: Any) -> str:
    return str(getattr(value, "__name__", value))


def as_yaml(command: str, options: dict[str, Any]) -> str:
    """Text of the YAML file that repeats a run, for `keras-t5gemma ... --config`.

    Args:
        command: name of the sub-command.
        options: all its options.
    """
    import yaml

    text = yaml.safe_dump(as_json(options), sort_keys=False, allow_unicode=True)
    return (
        f"# Repeats this run: keras-t5gemma {command} --config run.yaml\n"
        "# Relative paths start at the folder where the command was run.\n" + text
    )

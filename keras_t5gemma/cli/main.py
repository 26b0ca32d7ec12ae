"""The `keras-t5gemma` command: parser, configuration files and errors.

Options are dataclasses, read by tyro. Compared with jsonargparse (4.53), tyro (1.0.17)
accepts lists as `--train a.txt b.jsonl` (jsonargparse: `[a.txt,b.jsonl]`), spells flags
with dashes, and shows the docstring of each field in its help without another package.
Importing it takes 0.05 s of processor time (jsonargparse: 0.07 s), and its three
dependencies are pure Python. jsonargparse reads YAML itself; here `config_arguments`
turns a file into arguments, so that both have the same checks and messages.
"""

import contextlib
import dataclasses
import io
import itertools
import os
import re
import shlex
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from keras_t5gemma import environment
from keras_t5gemma.cli import commands, options
from keras_t5gemma.utils.files import read_text
from keras_t5gemma.utils.options import field_docs

COMMANDS: dict[str, tuple[type, Callable[[Any], int | None]]] = {
    "generate": (options.Generate, commands.run_generate),
    "pretrain": (options.Pretrain, commands.run_pretrain),
    "finetune": (options.Finetune, commands.run_finetune),
    "evaluate": (options.Evaluate, commands.run_evaluate),
    "presets": (options.Presets, commands.run_presets),
    "info": (options.Info, commands.run_info),
    "adapt": (options.Adapt, commands.run_adapt),
    "convert": (options.Convert, commands.run_convert),
    "verify": (options.Verify, commands.run_verify),
    "plan": (options.Plan, commands.run_plan),
}
SUBCOMMANDS: Any = typing.Union[  # noqa: UP007  Of a computed tuple.
    tuple(
        Annotated[kind, tyro.conf.subcommand(name, prefix_name=False)]
        for name, (kind, _) in COMMANDS.items()
    )
]
MARKERS = (
    tyro.conf.DisallowNone,
    tyro.conf.OmitArgPrefixes,
    tyro.conf.OmitSubcommandPrefixes,
)


@dataclasses.dataclass
class Arguments:
    """Encoder-decoder Gemma for Keras 3."""

    command: SUBCOMMANDS
    backend: Literal["tensorflow", "jax", "torch"] | None = None
    """Keras backend; without it KERAS_BACKEND, else Keras's choice."""
    version: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the versions of this package and its libraries, and exit."""


class UsageError(Exception):
    """Arguments that the command does not accept."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments; `None` takes those of the process.

    Returns:
        The exit status: 0, or 1 for an error, 2 for wrong arguments, 130 when
        interrupted. `verify` and `plan` also return 1 for a negative answer.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # A console may have few characters.
            stream.reconfigure(errors="backslashreplace")
    argv = sys.argv[1:] if argv is None else argv
    arguments = None
    try:
        if "--version" in itertools.takewhile(lambda word: word != "--", argv):
            print(", ".join(f"{k} {v}" for k, v in environment.versions().items()))
            return 0
        arguments = parse(argv)
        environment.choose_backend(arguments.backend)
        kinds = {kind: run for kind, run in COMMANDS.values()}
        return kinds[type(arguments.command)](arguments.command) or 0
    except BrokenPipeError:  # The reader, e.g. `head`, has closed the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("keras-t5gemma: interrupted.", file=sys.stderr)
        return 130
    except UsageError as error:
        print(f"keras-t5gemma: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        message = str(error)
        if arguments is not None:
            message = with_options(message, type(arguments.command))
        print(f"keras-t5gemma: {message}", file=sys.stderr)
        return 1


def with_options(message: str, command: type) -> str:
    """A message of a function with the command's options for the arguments it names.

    Args:
        message: with names of arguments in backticks.
        command: class of options.
    """
    hints = typing.get_type_hints(command, include_extras=True)
    hints.pop("config", None)  # In messages it is that of a model.
    message, of_file, rest = message.partition(".json: ")  # That has its own names.

    def spelled(match: re.Match[str]) -> str:
        name = match[1]
        if name not in hints:
            return match[0]
        if tyro.conf.Positional in getattr(hints[name], "__metadata__", ()):
            return name.upper()
        return f"--{name.replace('_', '-')}"

    return re.sub(r"`(\w+)`", spelled, message) + of_file + rest


def parse(argv: Sequence[str]) -> Arguments:
    """Parse arguments, with the options of a `--config` file inserted.

    Raises:
        UsageError: with one line that names the option.
        SystemExit: after `--help`.
    """
    argv = _insert_config(list(argv))
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(
                Arguments,
                prog="keras-t5gemma",
                args=argv,
                config=MARKERS,
                registry=_registry(),
            )
    except SystemExit as stop:
        if stop.code:
            raise UsageError(_one_line(stderr.getvalue())) from None
        raise


def _insert_config(argv: list[str]) -> list[str]:
    """Insert the options of `--config FILE` behind the command's name.

    Options on the command line come later, so they override the file's.
    """
    places = [i for i, word in enumerate(argv) if word in COMMANDS]
    if not places:
        return argv
    start = places[0] + 1
    command = argv[places[0]]
    for i, word in enumerate(argv[start:], start):
        name, equals, path = word.partition("=")
        if word == "--":
            break
        if name == "--config" and (equals or i + 1 < len(argv)):
            rest = itertools.takewhile(lambda word: word != "--", argv[i + 1 :])
            if "--config" in [word.partition("=")[0] for word in rest]:
                raise UsageError("--config must be given once.")
            inserted = config_arguments(command, path if equals else argv[i + 1])
            return argv[:start] + inserted + argv[start:]
    return argv


def config_arguments(command: str, path: str) -> list[str]:
    """Arguments that mean the same as a YAML file of options.

    Args:
        command: name of the sub-command.
        path: of the file.

    Raises:
        UsageError: for a file that is missing, not valid YAML or has unknown options.
    """
    import yaml

    fields = {field.name for field in dataclasses.fields(COMMANDS[command][0])}
    if "config" not in fields:
        raise UsageError(f"{command} does not accept --config.")
    try:
        content = yaml.safe_load(read_text(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} must hold a mapping of options.")
    arguments = []
    for name, value in content.items():
        flag = str(name).replace("_", "-")
        if str(name) not in fields - {"config"}:
            raise UsageError(f"--config {path}: {command} has no option {name!r}.")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            arguments += [f"--{flag}", *map(str, value)]
        elif value is not None:
            arguments.append(f"--{flag}={value}")
    return arguments


def _registry() -> ConstructorRegistry:
    """How tyro reads the options dataclasses."""
    registry = ConstructorRegistry()
    registry.struct_rule(_fields)
    registry.primitive_rule(_text)
    registry.primitive_rule(_path)
    return registry


def _fields(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Fields of an options dataclass: help from docstrings, no `(default: None)`."""
    if info.type not in {Arguments, *(kind for kind, _ in COMMANDS.values())}:
        return None
    hints = typing.get_type_hints(info.type, include_extras=True)
    docs = field_docs(info.type)
    fields = []
    for field in dataclasses.fields(info.type):
        hint, default = hints[field.name], field.default
        settings: dict[str, Any] = {}
        if default is dataclasses.MISSING:
            default = tyro.MISSING_NONPROP
        elif default in (None, ()):
            settings["help_behavior_hint"] = ""
        if tyro.conf.Positional in getattr(hint, "__metadata__", ()):
            name = field.name.upper()
            is_required = field.default is dataclasses.MISSING
            settings["metavar"] = name if is_required else f"[{name}]"
        if settings:
            hint = Annotated[hint, tyro.conf.arg(**settings)]
        fields.append(StructFieldSpec(field.name, hint, default, docs.get(field.name)))
    return StructConstructorSpec(info.type, tuple(fields))


def _text(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Options that are text here and may be other objects in Python.

    Examples are `str | os.PathLike`, a sequence of them, `str | Callable`.
    """
    if typing.get_origin(info.type) not in (typing.Union, types.UnionType):
        return None
    members = set(typing.get_args(info.type)) - {types.NoneType}
    others = members - {str, int, float}
    if not others or (str not in members and Sequence[str] not in members):
        return None
    is_list = any(typing.get_origin(member) is Sequence for member in others)
    return PrimitiveConstructorSpec(
        nargs="*" if is_list else 1,
        metavar="NAME [NAME ...]" if is_list else "NAME",
        instance_from_str=tuple if is_list else lambda words: words[0],
        is_instance=lambda value: True,
        str_from_instance=_words,
    )


def _path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Paths, of which `Path` takes an empty one for the current folder."""
    if set(typing.get_args(info.type) or [info.type]) - {types.NoneType} != {Path}:
        return None

    def read(words: list[str]) -> Path:
        if not words[0]:
            raise ValueError("a path must not be empty.")
        return Path(words[0])

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=_words,
    )


def _words(value: Any) -> list[str]:
    return list(value) if isinstance(value, tuple | list) else [str(value)]


def _one_line(message: str) -> str:
    """The first paragraph of tyro's boxed error message."""
    message = re.sub(r"\x1b\[[0-9;]*m", "", message)
    lines = [line.strip().strip("│|").strip() for line in message.splitlines()]
    if "Required options" in lines[0]:
        unknown = "Unrecognized options:"
        if unknown in lines:
            words = itertools.takewhile(
                lambda line: not line.startswith(("──", "---")),
                lines[lines.index(unknown) + 1 :],
            )
            return f"{unknown} {shlex.join(words)}"
        flags = [re.match(r"--\w[\w-]*|[A-Z]+(?= |$)", line) for line in lines[1:]]
        names = dict.fromkeys(flag.group() for flag in flags if flag)
        return f"Missing options: {', '.join(names)}"
    paragraphs = re.split(r"^\W*$", "\n".join(lines[1:]), flags=re.MULTILINE)
    text = " ".join(next(filter(str.strip, paragraphs), message).split())
    # Of a positional argument tyro says the name of its field.
    return re.sub(r"'command\.(\w+)'", lambda field: field[1].upper(), text)

"""Presets by name, folder or handle: location of the files, and their format."""

import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, Union

from keras_t5gemma.checkpoints import (
    atomic,
    catalog,
    hub,
    keras_hub_format,
    published_names,
)
from keras_t5gemma.checkpoints.hub import get_file
from keras_t5gemma.utils.checks import shown, string
from keras_t5gemma.utils.files import (
    check_regular,
    named_values,
    read_json_file,
)

KERAS, KERAS_HUB, HUGGING_FACE = "keras_t5gemma", "keras_hub", "transformers"
VOCABULARY_FILE, HUGGING_FACE_TOKENIZER = "vocabulary.spm", "tokenizer.model"
TOKENIZER_JSON = "tokenizer.json"
PresetLike: TypeAlias = Union[str, "os.PathLike[str]", "Source"]
_PACKAGE = "keras_t5gemma>"


@dataclasses.dataclass(frozen=True)
class Source:
    """A preset whose files were located; its config.json was read once.

    `resolve` makes it. `from_preset` passes it on in place of the name.

    Args:
        preset: name, folder or handle, as it was given.
        location: folder or handle of the files.
        format: `KERAS`, `KERAS_HUB` or `HUGGING_FACE`.
        config: the parsed config.json.
        takes_head: whether the caller loads a head for classification too.
    """

    preset: str
    location: str
    format: str
    config: dict[str, Any]
    takes_head: bool = False

    def __str__(self) -> str:
        return self.preset

    def read_json(self, name: str, default: Any = None) -> Any:
        """Another JSON file of the preset; see `read_json`."""
        return read_json(self.location, name, default)

    def tokenizer_file(self) -> str:
        """Path of the SentencePiece model or tokenizer.json; see `tokenizer_file`."""
        return tokenizer_file(self.location, self.format)

    def download(self) -> Path:
        """Local folder with all files of the preset; see `download`."""
        return download(self.location)

    @property
    def is_instruction_tuned(self) -> bool:
        """Whether it is a published instruction-tuned checkpoint.

        Nothing is guessed from other names; see `published_names.is_published`.
        """
        tuned = {name for name, row in catalog.published().items() if row[-1]}
        known = [s for name in tuned for s in (name, *catalog.sources()[name])]
        return published_names.is_published(self.preset, known)


def resolve(preset: PresetLike) -> Source:
    """Locate a T5Gemma preset, read its config.json and detect its format.

    Args:
        preset: a name of `presets()`, a local folder, `hf://owner/name` or
            `kaggle://owner/model/keras/variation`; or a `Source`, which is returned.

    Raises:
        ValueError: for an unknown name (with the nearest ones), a folder without
            config.json, or a model that is not T5Gemma.
        OSError: when a download fails, with instructions.
    """
    if isinstance(preset, Source):
        return preset
    if is_single_file(preset):
        return Source(os.fspath(preset), os.fspath(preset), HUGGING_FACE, {})
    names = {name: sources[0] for name, sources in catalog.sources().items()}
    location = locate(preset, names, "one of `keras_t5gemma.presets()`")
    config = read_json(location)
    registered = config.get("registered_name") or ""
    with named_values(f"{location}: config.json"):
        string(registered, "registered_name")
    if registered.startswith(_PACKAGE):
        kind = KERAS
    elif registered == keras_hub_format.T5GEMMA:
        kind = KERAS_HUB
    elif config.get("model_type") in ("t5gemma", "t5_gemma_module"):
        kind = HUGGING_FACE
    else:
        found = registered or config.get("model_type") or "no model"
        adapt = (
            " `keras_t5gemma.adapt_gemma2` turns a Gemma 2 into a T5Gemma."
            if found in (keras_hub_format.GEMMA, "gemma2")
            else ""
        )
        raise ValueError(
            f"{location} is not a checkpoint of T5Gemma: its config.json holds "
            f"{found!r}. Accepted are presets of keras_t5gemma and of KerasHub's "
            f"T5Gemma, and transformers folders of model_type 't5gemma'.{adapt}"
        )
    return Source(os.fspath(preset), location, kind, config)


def is_single_file(preset: Any) -> bool:
    """Whether it is the path of one weight file, without a config.json."""
    is_path = isinstance(preset, str | os.PathLike) and "://" not in str(preset)
    return is_path and str(preset).endswith(".safetensors") and os.path.isfile(preset)


LOCATION = ("subfolder", "revision", "config")  # Keywords of `from_preset`.


def take_location(preset: PresetLike, kwargs: dict[str, Any]) -> PresetLike:
    """A preset with the keywords `LOCATION` taken out of `kwargs` and applied.

    Args:
        preset: name, folder or handle.
        kwargs: changed in place. `subfolder` is a relative path; `revision` a branch,
            tag or commit of `hf://`; `config` a size of `config.STACKS`, or a
            `T5GemmaConfig`, for one weight file without a config.json.

    Raises:
        ValueError: for a keyword that does not fit the preset.
    """
    given = {name: kwargs.pop(name, None) for name in LOCATION}
    subfolder, revision, config = given.values()
    if subfolder is None and revision is None and config is None:
        return preset
    if config is not None:
        if not is_single_file(preset) or subfolder or revision:
            raise ValueError(
                "`config` is for one .safetensors file without a config.json; got "
                f"{config!r} with {preset!r}."
            )
        location = os.fspath(preset)  # type: ignore[arg-type]
        return Source(location, location, HUGGING_FACE, {"config": config})
    location = os.fspath(preset) if isinstance(preset, str | os.PathLike) else ""
    location = catalog.sources().get(location, (location,))[0]
    scheme, handle = hub.split(location)
    if revision is not None:
        repository, inner = "", ""
        known: dict[str, str] = {}
        if scheme == "hf":
            repository, inner, known = hub.split_hugging_face(handle)
        if scheme != "hf" or known or not isinstance(revision, str):
            raise ValueError(
                "`revision` must be a branch, tag or commit of an hf:// handle without "
                f"one; got {revision!r} for {location!r}."
            )
        location = f"hf://{repository}@{revision}" + (f"/{inner}" if inner else "")
    if subfolder is not None:
        if scheme == "kaggle":
            raise ValueError(f"`subfolder` is for folders and hf://; got {location!r}.")
        location = f"{location.rstrip('/')}/{hub.check_subfolder(subfolder)}"
    return location


def locate(preset: Any, names: Mapping[str, str], accepted: str) -> str:
    """Folder or handle of a name, folder or handle.

    Args:
        preset: a key of `names`, a local folder, or a handle.
        names: `{name: folder or handle}`.
        accepted: description of the names, for the message.

    Raises:
        ValueError: for anything else, with the nearest names.
    """
    if not isinstance(preset, str | os.PathLike):
        raise ValueError(f"`preset` must be a string; got {shown(preset)}.")
    location = os.fspath(preset)
    if "://" in location:
        hub.split(location)
        return location
    if os.path.isdir(location):
        atomic.finish_interrupted_save(location)
        return location
    if location in names:
        return names[location]
    near = difflib.get_close_matches(location, names, n=3, cutoff=0.5)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    raise ValueError(
        f"`preset` must be {accepted}, a local folder, or an hf:// or kaggle:// "
        f"handle; got {location!r}, which is neither a name nor a folder.{hint}"
    )


def read_json(location: str, name: str = "config.json", default: Any = None) -> Any:
    """Read a JSON object of a folder or handle; `default` if the file is missing.

    Raises:
        ValueError: if it is missing without a default, or not a JSON object.
        OSError: when a download fails, with instructions.
    """
    try:
        path = get_file(location, name)
    except Exception as error:
        if default is not None and isinstance(error, FileNotFoundError):
            return default
        if "://" in location:
            raise _download_error(location, error) from error
        if isinstance(error, FileNotFoundError):
            raise ValueError(_no_checkpoint(location, name)) from error
        raise
    parsed = read_json_file(path)
    if not isinstance(parsed, dict):
        raise ValueError(f"{path} must hold a JSON object; got {parsed!r}.")
    return parsed


def _no_checkpoint(location, name):
    if atomic.has_incomplete_save(location):
        return (
            f"{location} holds no checkpoint: the save into it was interrupted. Run it "
            "again."
        )
    return f"{location} has no {name}: it is not a preset."


def download(location: str) -> Path:
    """Local folder of a folder or handle, with all its files.

    Raises:
        OSError: when the download fails, with instructions.
    """
    hub.split(location)
    try:
        return hub.get_folder(location)
    except Exception as error:
        raise _download_error(location, error) from error


def _tokenizer_names(kind):
    """Names that a format's tokenizer file has, the preferred one first."""
    if kind != HUGGING_FACE:
        return (f"assets/tokenizer/{VOCABULARY_FILE}",)
    return (HUGGING_FACE_TOKENIZER, TOKENIZER_JSON)


def has_tokenizer(folder: str | os.PathLike[str], kind: str) -> bool:
    """Whether a local folder of a format has a tokenizer's vocabulary."""
    return any((Path(folder) / name).exists() for name in _tokenizer_names(kind))


def tokenizer_file(location: str, kind: str) -> str:
    """Path of the SentencePiece model of a folder or handle, downloaded if needed.

    In transformers' format it is a tokenizer.json if there is no SentencePiece model.

    Args:
        location: folder or handle.
        kind: its format.

    Raises:
        ValueError: if a folder has none.
        OSError: when a download fails, with instructions.
    """
    names = _tokenizer_names(kind)
    for name in names:
        try:
            path = get_file(location, name)
        except Exception as error:
            if isinstance(error, FileNotFoundError) and name != names[-1]:
                continue
            if "://" in location:
                raise _download_error(location, error) from error
            raise ValueError(
                f"{location} has no {' and no '.join(names)}, the vocabulary of the "
                "tokenizer; copy it there, or pass preprocessor=None to work on ids."
            ) from error
        check_regular(path)
        break
    return path


def _download_error(location, error):
    others = [
        source
        for sources in catalog.sources().values()
        if location in sources
        for source in sources
        if source != location
    ]
    elsewhere = f" The same weights are at {', '.join(others)}." if others else ""
    return OSError(
        f"{location} could not be downloaded ({type(error).__name__}: {error}). Check "
        "the name and the network; the Gemma checkpoints also need their license "
        "accepted on the model's page and a login: `hf auth login` for hf://, "
        f"KAGGLE_USERNAME and KAGGLE_KEY for kaggle://.{elsewhere} A folder "
        "downloaded by other means can be passed as a path."
    )


def check_keywords(kwargs: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise `ValueError` for a keyword that `from_preset` would ignore."""
    unknown = sorted(set(kwargs) - set(known))
    if unknown:
        raise ValueError(
            f"`{where}.from_preset` got unknown keywords {unknown}; known: "
            f"{sorted(known)}."
        )

"""Names, folders and handles: where a checkpoint's files are, and their format."""

import dataclasses
import difflib
import json
import os
from pathlib import Path

from keras_t5gemma.checkpoints import atomic, hub, keras_hub_format
from keras_t5gemma.checkpoints.hub import get_file
from keras_t5gemma.config import T5GemmaConfig

EMBEDDED_FOLDER = Path(__file__).parent.parent / "_presets"
KERAS, KERAS_HUB, HUGGING_FACE = "keras_t5gemma", "keras_hub", "transformers"
VOCABULARY_FILE, HUGGING_FACE_TOKENIZER = "vocabulary.spm", "tokenizer.model"
_PACKAGE = "keras_t5gemma>"
_EMBEDDED = {  # Objective, tuned.
    "t5gemma_mini": ("PrefixLM", False),
    "t5gemma_mini_synopsis": ("supervised", True),
}
_PAIRS = (
    ("s", "s"),
    ("b", "b"),
    ("l", "l"),
    ("ml", "ml"),
    ("xl", "xl"),
    ("2b", "2b"),
    ("9b", "2b"),
    ("9b", "9b"),
)


@dataclasses.dataclass(frozen=True)
class Preset:
    """One row of `presets()`.

    Args:
        name: what `from_preset` takes.
        description: one line.
        objective: `"PrefixLM"` or `"UL2"` of the adaptation; `"supervised"` for a
            preset that was fine-tuned here.
        tuned: whether it was fine-tuned (instruction-tuned, the published ones).
        parameters: exact count.
        sources: handles or folders that hold the same weights, the default first.
    """

    name: str
    description: str
    objective: str
    tuned: bool
    parameters: int
    sources: tuple


def presets():
    """All named presets: the embedded ones first, then the published ones.

    Returns:
        A list of `Preset`. The 32 published names follow arXiv 2504.06225:
        eight pairs, two objectives, pretrained or instruction-tuned (`_it`); each
        lies on Hugging Face and, in KerasHub's format, on Kaggle.
    """
    rows = []
    for name, (objective, tuned) in _EMBEDDED.items():
        folder = EMBEDDED_FOLDER / name
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        card = (folder / "README.md").read_text(encoding="utf-8")
        rows.append(
            Preset(
                name,
                _first_paragraph(card),
                objective,
                tuned,
                T5GemmaConfig.from_dict(config["config"]["config"]).count_params(),
                (str(folder),),
            )
        )
    for name, (encoder, decoder, objective, tuned) in _published().items():
        kind = "instruction-tuned" if tuned else "pretrained"
        rows.append(
            Preset(
                name,
                f"{encoder.upper()} encoder, {decoder.upper()} decoder, {kind}, "
                f"{objective}.",
                objective,
                tuned,
                T5GemmaConfig.pair(encoder, decoder).count_params(),
                (
                    "hf://google/" + name.replace("_", "-"),
                    f"kaggle://keras/t5-gemma/keras/{name}/1",
                ),
            )
        )
    return rows


def _first_paragraph(card):
    """The first paragraph of a model card, after its metadata and its title."""
    body = card.partition("\n---\n")[2] if card.startswith("---\n") else card
    texts = (part.strip() for part in body.split("\n\n"))
    return next(t for t in texts if t and not t.startswith("#")).replace("\n", " ")


def _published():
    return {
        f"t5gemma_{encoder}_{decoder}_{objective.lower()}{'_it' * tuned}": (
            encoder,
            decoder,
            objective,
            tuned,
        )
        for encoder, decoder in _PAIRS
        for objective in ("PrefixLM", "UL2")
        for tuned in (False, True)
    }


def published_config(preset):
    """The `T5GemmaConfig` of a published name, without network; else `None`."""
    row = _published().get(preset) if isinstance(preset, str) else None
    return row and T5GemmaConfig.pair(*row[:2])


def pair_config(name):
    """The `T5GemmaConfig` of a published pair without an objective, `"t5gemma_9b_2b"`.

    `None` for what is no such name.
    """
    pairs = {"_".join(("t5gemma", *pair)): pair for pair in _PAIRS}
    return T5GemmaConfig.pair(*pairs[name]) if name in pairs else None


def resolve(preset):
    """The folder or handle of a T5Gemma preset, and its format.

    Args:
        preset: a name of `presets()`, a local folder, `hf://owner/name` or
            `kaggle://owner/model/keras/variation`.

    Returns:
        `(location, KERAS, KERAS_HUB or HUGGING_FACE)`.

    Raises:
        ValueError: for an unknown name (with the nearest ones), a folder without
            config.json, or a model that is no T5Gemma.
        OSError: when a download fails, with what to do.
    """
    names = {row.name: row.sources[0] for row in presets()}
    location = locate(preset, names, "one of `keras_t5gemma.presets()`")
    config = read_json(location)
    registered = config.get("registered_name") or ""
    if registered.startswith(_PACKAGE):
        return location, KERAS
    if registered == keras_hub_format.T5GEMMA:
        return location, KERAS_HUB
    if config.get("model_type") == "t5gemma":
        return location, HUGGING_FACE
    found = registered or config.get("model_type") or "no model at all"
    adapt = (
        " A Gemma 2 is turned into a T5Gemma by `keras_t5gemma.adapt_gemma2`."
        if found in (keras_hub_format.GEMMA, "gemma2")
        else ""
    )
    raise ValueError(
        f"{location} is not a checkpoint of T5Gemma that can be read here: its "
        f"config.json holds {found!r}. Read are presets of keras_t5gemma and of "
        f"KerasHub's T5Gemma, and transformers folders of model_type 't5gemma'.{adapt}"
    )


def locate(preset, names, accepted):
    """A folder or handle from what a user gave.

    Args:
        preset: a key of `names`, a local folder, or a handle.
        names: `{name: folder or handle}`.
        accepted: what the names are, for the message.

    Raises:
        ValueError: for what is neither, with the nearest names.
    """
    if not isinstance(preset, str | os.PathLike):
        raise ValueError(f"`preset` must be a string; got {preset!r}.")
    location = os.fspath(preset)
    if "://" in location:
        hub.split(location)
        return location
    if os.path.isdir(location):
        atomic.finish(location)
        return location
    if location in names:
        return names[location]
    near = difflib.get_close_matches(location, names, n=3, cutoff=0.5)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    raise ValueError(
        f"`preset` must be {accepted}, a local folder, or an hf:// or kaggle:// "
        f"handle; got {location!r}, which is no name and no folder.{hint}"
    )


def read_json(location, name="config.json", default=None):
    """A JSON file of a folder or handle; `default` when it is not there.

    Raises:
        ValueError: when it is missing without a default, or no JSON.
        OSError: when a download fails, with what to do.
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
    try:
        parsed = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{path} must hold a JSON object; got {parsed!r}.")
    return parsed


def _no_checkpoint(location, name):
    if atomic.is_unfinished(location):
        return (
            f"{location} holds no checkpoint: the save that would have made it was "
            "interrupted. Run it again."
        )
    return f"{location} has no {name}: it is no preset."


def download(location):
    """The local folder of a location, with all its files.

    Raises:
        OSError: when the download fails, with what to do.
    """
    hub.split(location)
    try:
        return hub.get_folder(location)
    except Exception as error:
        raise _download_error(location, error) from error


def tokenizer_file(location, kind):
    """The SentencePiece model of a folder or handle, downloaded if need be.

    Raises:
        ValueError: when a folder has none.
        OSError: when a download fails, with what to do.
    """
    name = HUGGING_FACE_TOKENIZER
    if kind != HUGGING_FACE:
        name = f"assets/tokenizer/{VOCABULARY_FILE}"
    try:
        return get_file(location, name)
    except Exception as error:
        if "://" in location:
            raise _download_error(location, error) from error
        raise ValueError(
            f"{location} has no {name}, the SentencePiece model; copy it there, or "
            "pass preprocessor=None to work on ids."
        ) from error


def _download_error(location, error):
    others = [
        source
        for row in presets()
        if location in row.sources
        for source in row.sources
        if source != location
    ]
    elsewhere = f" The same weights lie at {', '.join(others)}." if others else ""
    return OSError(
        f"{location} could not be downloaded ({type(error).__name__}: {error}). Check "
        "the name and the network; the Gemma checkpoints also need their licence "
        "accepted on the model's page and a login: `hf auth login` for hf://, "
        f"KAGGLE_USERNAME and KAGGLE_KEY for kaggle://.{elsewhere} A folder "
        "downloaded by other means can be passed as a path."
    )


def is_instruction_tuned(preset):
    """Whether a name, folder or handle says so: `-it`, `_it`, `instruct`."""
    parts = [p for p in os.fspath(preset).rstrip("/").split("/") if not p.isdigit()]
    name = parts[-1] if parts else ""
    return name.endswith(("-it", "_it")) or "instruct" in name


def check_keywords(kwargs, known, where):
    """Raise `ValueError` for a keyword that `from_preset` would ignore."""
    unknown = sorted(set(kwargs) - set(known))
    if unknown:
        raise ValueError(
            f"`{where}.from_preset` got unknown keywords {unknown}; known: "
            f"{sorted(known)}."
        )

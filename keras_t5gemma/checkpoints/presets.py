"""Names, folders and handles: where a preset's files are, and their format."""

import dataclasses
import difflib
import json
import os
from pathlib import Path

from keras_hub.src.utils.preset_utils import get_file

from keras_t5gemma.config import T5GemmaConfig

EMBEDDED_FOLDER = Path(__file__).parent.parent / "presets"
KERAS, HUGGING_FACE = "keras_t5gemma", "transformers"
_PACKAGE = "keras_t5gemma>"


@dataclasses.dataclass(frozen=True)
class Preset:
    """One row of `presets()`.

    Args:
        name: what `from_preset` takes.
        description: one line.
        parameters: exact count.
        source: a folder inside the package, or an `hf://` handle.
    """

    name: str
    description: str
    parameters: int
    source: str


def presets():
    """All named presets: the embedded one first, then the published ones.

    Returns:
        A list of `Preset`. The 32 published names follow arXiv 2504.06225:
        eight pairs, two objectives, pretrained or instruction-tuned (`_it`).
    """
    rows = []
    for folder in sorted(EMBEDDED_FOLDER.glob("*/config.json")):
        config = json.loads(folder.read_text(encoding="utf-8"))["config"]["config"]
        card = (folder.parent / "README.md").read_text(encoding="utf-8")
        rows.append(
            Preset(
                folder.parent.name,
                card.split("\n\n")[1].replace("\n", " "),
                T5GemmaConfig.from_dict(config).count_params(),
                str(folder.parent),
            )
        )
    pairs = [(size, size) for size in ("s", "b", "l", "ml", "xl", "2b", "9b")]
    for encoder, decoder in [*pairs[:-1], ("9b", "2b"), pairs[-1]]:
        parameters = T5GemmaConfig.pair(encoder, decoder).count_params()
        for objective in ("prefixlm", "ul2"):
            for tuned in ("", "_it"):
                name = f"t5gemma_{encoder}_{decoder}_{objective}{tuned}"
                kind = "instruction-tuned" if tuned else "pretrained"
                description = (
                    f"{encoder.upper()} encoder, {decoder.upper()} decoder, "
                    f"{kind}, {'UL2' if objective == 'ul2' else 'PrefixLM'}."
                )
                handle = "hf://google/" + name.replace("_", "-")
                rows.append(Preset(name, description, parameters, handle))
    return rows


def resolve(preset):
    """The folder or handle of a preset, and its format.

    Args:
        preset: a name of `presets()`, a local folder, `hf://owner/name` or
            `kaggle://owner/model/keras/variation`. Hugging Face checkpoints are
            downloaded here, by huggingface_hub, into its cache.

    Returns:
        `(location, KERAS or HUGGING_FACE)`.

    Raises:
        ValueError: for an unknown name (with the nearest ones), a folder without
            config.json, or a model that is no T5Gemma.
        OSError: when a download fails, with what to do.
    """
    if not isinstance(preset, str | os.PathLike):
        raise ValueError(f"`preset` must be a string; got {preset!r}.")
    location = os.fspath(preset)
    if "://" not in location and not os.path.isdir(location):
        known = {row.name: row.source for row in presets()}
        if location not in known:
            near = difflib.get_close_matches(location, known, n=3, cutoff=0.5)
            hint = f" Did you mean {', '.join(near)}?" if near else ""
            raise ValueError(
                f"`preset` must be one of `keras_t5gemma.presets()`, a local folder, "
                f"or an hf:// or kaggle:// handle; got {location!r}, which is no "
                f"name and no folder.{hint}"
            )
        location = known[location]
    config_path = _config_file(location)
    try:
        config = json.loads(Path(config_path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config_path} is not JSON: {error}") from error
    registered = config.get("registered_name") or ""
    if registered.startswith(_PACKAGE):
        return location, KERAS
    if config.get("model_type") == "t5gemma":
        if location.startswith("hf://"):
            location = _download_from_hugging_face(location)
        return location, HUGGING_FACE
    found = registered or config.get("model_type") or "no model at all"
    raise ValueError(
        f"{config_path} is not a checkpoint of T5Gemma that can be read here: it "
        f"holds {found!r}. Read are keras_t5gemma presets and transformers folders "
        "of model_type 't5gemma'."
    )


def _config_file(location):
    try:
        return get_file(location, "config.json")
    except Exception as error:
        if "://" in location:  # "Not found" may be "not reached": KerasHub's own
            cause = error.__cause__ or error  # message does not tell them apart.
            raise _download_error(location, cause) from error
        if isinstance(error, FileNotFoundError):
            raise ValueError(
                f"{location} has no config.json: it is no preset."
            ) from error
        raise


def _download_from_hugging_face(location):
    import huggingface_hub

    try:
        return huggingface_hub.snapshot_download(
            location.removeprefix("hf://"),
            allow_patterns=["*.json", "*.safetensors", "tokenizer.model"],
        )
    except Exception as error:
        raise _download_error(location, error) from error


def _download_error(location, error):
    return OSError(
        f"{location} could not be downloaded ({type(error).__name__}: {error}). Check "
        "the name and the network; the Gemma checkpoints also need their licence "
        "accepted on the model's page and a login: `hf auth login` for hf://, "
        "KAGGLE_USERNAME and KAGGLE_KEY for kaggle://. A folder downloaded by other "
        "means can be passed as a path."
    )


def check_keywords(kwargs, known, where):
    """Raise `ValueError` for a keyword that `from_preset` would ignore."""
    unknown = sorted(set(kwargs) - set(known))
    if unknown:
        raise ValueError(
            f"`{where}.from_preset` got unknown keywords {unknown}; known: "
            f"{sorted(known)}."
        )

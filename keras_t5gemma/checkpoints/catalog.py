"""Presets by name: the embedded ones and the published checkpoints."""

import dataclasses
from pathlib import Path
from typing import Any

from keras_t5gemma.config import T5GemmaConfig
from keras_t5gemma.utils.files import read_json_file, read_text

EMBEDDED_FOLDER = Path(__file__).parent.parent / "_presets"
_EMBEDDED = {  # Objective, tuned.
    "t5gemma_mini": ("UL2 and PrefixLM", False),
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
        objective: `"PrefixLM"` or `"UL2"` of the adaptation, `"UL2 and PrefixLM"`;
            `"supervised"` for a preset that was fine-tuned here.
        tuned: whether it was fine-tuned (instruction-tuned, the published ones).
        parameters: exact count.
        sources: folder or handles of the same weights, the default first.
    """

    name: str
    description: str
    objective: str
    tuned: bool
    parameters: int
    sources: tuple


def presets() -> list[Preset]:
    """All named presets: the embedded ones first, then the published ones.

    The 32 published names follow arXiv 2504.06225: eight pairs of sizes, two
    objectives, pretrained or instruction-tuned (`_it`). Each is on Hugging Face and,
    in KerasHub's format, on Kaggle.

    Returns:
        A list of `Preset`, whose fields are `name`, `description`, `objective`,
        `tuned`, `parameters` and `sources`.

    Examples:
        >>> [row.name for row in keras_t5gemma.presets()][:2]
        ['t5gemma_mini', 't5gemma_mini_synopsis']
    """
    rows, places = [], sources()
    for name, (objective, tuned) in _EMBEDDED.items():
        folder = EMBEDDED_FOLDER / name
        config = read_json_file(folder / "config.json")
        card = read_text(folder / "README.md")
        rows.append(
            Preset(
                name,
                _first_paragraph(card),
                objective,
                tuned,
                T5GemmaConfig.from_dict(config["config"]["config"]).count_params(),
                places[name],
            )
        )
    for name, (encoder, decoder, objective, tuned) in published().items():
        kind = "instruction-tuned" if tuned else "pretrained"
        rows.append(
            Preset(
                name,
                f"{encoder.upper()} encoder, {decoder.upper()} decoder, {kind}, "
                f"{objective}.",
                objective,
                tuned,
                T5GemmaConfig.pair(encoder, decoder).count_params(),
                places[name],
            )
        )
    return rows


def sources() -> dict[str, tuple[str, ...]]:
    """Folder or handles of every named preset, the default first."""
    places: dict[str, tuple[str, ...]] = {
        name: (str(EMBEDDED_FOLDER / name),) for name in _EMBEDDED
    }
    for name in published():
        hugging_face = "hf://google/" + name.replace("_", "-")
        places[name] = (hugging_face, f"kaggle://keras/t5-gemma/keras/{name}/1")
    return places


def _first_paragraph(card):
    """The first paragraph of a model card, after its metadata and its title."""
    body = card.partition("\n---\n")[2] if card.startswith("---\n") else card
    texts = (part.strip() for part in body.split("\n\n"))
    return next(t for t in texts if t and not t.startswith("#")).replace("\n", " ")


def published() -> dict[str, tuple[str, str, str, bool]]:
    """Encoder size, decoder size, objective and tuning of the published names."""
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


def published_config(preset: Any) -> T5GemmaConfig | None:
    """The `T5GemmaConfig` of a published name, without network; else `None`."""
    row = published().get(preset) if isinstance(preset, str) else None
    return T5GemmaConfig.pair(*row[:2]) if row else None


def pair_config(name: str) -> T5GemmaConfig | None:
    """The `T5GemmaConfig` of a pair of sizes, e.g. `"t5gemma_9b_2b"`, else `None`."""
    pairs = {"_".join(("t5gemma", *pair)): pair for pair in _PAIRS}
    return T5GemmaConfig.pair(*pairs[name]) if name in pairs else None

"""Model cards: a preset's README.md with the metadata that the Hugging Face Hub reads.

The metadata (`model-index`, license, base model, language, task) is built by
`huggingface_hub`, so that the Hub shows the scores on the model's page.
"""

import json
import numbers
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_t5gemma.checkpoints.atomic import atomic_file
from keras_t5gemma.checkpoints.catalog import presets

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

# KerasHub's own cards say so, and the Hub filters by it; it knows no keras_t5gemma.
LIBRARY, TAGS = "keras-hub", ("keras_t5gemma", "t5gemma")
# The Hub's tasks have no text-to-text any more, and T5Gemma is listed under this one.
PIPELINE = "text-generation"
_SPLITS = ("train", "valid", "test")
# measure of `score_texts` or `evaluate`: (metric id of the Hub, name that is shown)
_METRICS = {
    "rouge1": ("rouge", "ROUGE-1"),
    "rouge2": ("rouge", "ROUGE-2"),
    "rougeL": ("rouge", "ROUGE-L"),
    "rougeLsum": ("rouge", "ROUGE-Lsum"),
    "bleu": ("sacrebleu", "BLEU"),
    "chrf": ("chrf", "chrF"),
    "accuracy": ("accuracy", "Token accuracy"),
    "perplexity": ("perplexity", "Perplexity"),
    "loss": ("loss", "Loss"),
}
_LICENSE = """\
## License

Where the weights it was trained from are Gemma's, this model is a derivative of Gemma:
the Gemma Terms of Use (https://ai.google.dev/gemma/terms) apply to it and have to be
passed on with it. The license of the training data is for its publisher to state.
"""


def write_model_card(
    folder: str | os.PathLike,
    title: str,
    base: str | None,
    data: list[dict],
    training: Mapping[str, Any],
    scores: Mapping[str, Any],
) -> Path:
    """Write a trained preset's model card, README.md.

    It states what it is given and nothing else. An earlier README.md is replaced.

    Args:
        folder: path of the preset.
        title: one line.
        base: the preset that the training started from; `None` leaves it out. Its
            repository on the Hub, if it has one, becomes `base_model`.
        data: list of dicts, one a file, e.g. `{"split": "test", "file": "test.jsonl",
            "rows": 100, "sha256": "..."}`; their keys are the columns of a table.
        training: settings and their values.
        scores: what `score_texts` returns, or a dict of numbers. A name may start with
            the split it was measured on, e.g. `"test rougeL"`; `before` in a score is
            the base's.

    Returns:
        The path of the file.

    Raises:
        ValueError: when the folder does not exist, or the card is not valid metadata.
    """
    files = {row["split"]: row["file"] for row in data if {"split", "file"} <= set(row)}
    results = []
    for name, score in scores.items():
        first, _, rest = name.partition(" ")
        split, measure = (first, rest) if first in _SPLITS and rest else (None, name)
        dataset = str(files.get(split, "not named"))
        results.append(eval_result(measure, _mean(score), dataset, split))
    hub_id = hub_model_id(base)
    metadata = card_metadata(
        Path(folder).resolve().name,
        results,
        base_model=hub_id,
        license="gemma" if _is_gemma(hub_id) else None,
    )
    body = [
        f"# {_one_line(title)}\n",
        _description(base),
        _usage(Path(folder)),
        "## Data\n\n" + (_table(data) if data else "None was recorded.\n"),
        "## Training\n\n" + _settings(training),
        "## Scores\n\n" + _score_table(scores),
        _limits(scores),
        _LICENSE,
    ]
    return save_card(folder, metadata, "\n".join(body))


def card_metadata(
    name: str, results: "Sequence[EvalResult]" = (), **fields: Any
) -> "ModelCardData":
    """Metadata of a model card, as the Hub reads it.

    Args:
        name: of the model, the `name` of its `model-index`.
        results: scores, see `eval_result`.
        fields: of `huggingface_hub.ModelCardData`, e.g. `license="apache-2.0"`,
            `language="en"`, `base_model="google/t5gemma-s-s-ul2"`; `None` leaves a
            field out. `pipeline_tag` is `"text-generation"` by default.
    """
    known = {"library_name": LIBRARY, "pipeline_tag": PIPELINE, "tags": list(TAGS)}
    scores = {"model_name": name, "eval_results": list(results)} if results else {}
    from huggingface_hub import ModelCardData  # A quarter of a second.

    return ModelCardData(**{**known, **scores, **fields})


def eval_result(
    measure: str,
    value: float,
    dataset: str,
    split: str | None = None,
    task: str = PIPELINE,
    variant: str | None = None,
) -> "EvalResult":
    """One score of a `model-index`.

    Args:
        measure: e.g. `"rougeL"`, `"bleu"`, `"loss"`; others keep their name.
        value: kept with four significant digits.
        dataset: name of the data that it was measured on.
        split: of the data, e.g. `"test"`.
        task: of the Hub's tasks.
        variant: how the texts were made, e.g. `"5 beams"`, part of the name shown.
    """
    metric, shown = _METRICS.get(measure, (measure, measure))
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type=task,
        dataset_type=re.sub(r"[^\w.-]+", "-", dataset).strip("-"),
        dataset_name=dataset,
        dataset_split=split,
        metric_type=metric,
        metric_name=f"{shown} ({variant})" if variant else shown,
        metric_value=float(f"{value:.4g}"),
    )


def save_card(folder: str | os.PathLike, metadata: "ModelCardData", body: str) -> Path:
    """Write README.md of a preset atomically, after checking its metadata.

    Args:
        folder: path of the preset.
        metadata: see `card_metadata`.
        body: Markdown.

    Returns:
        The path of the file.

    Raises:
        ValueError: when the folder does not exist, or when the metadata is not what
            `huggingface_hub` reads from the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder` must be the folder of a preset; got {folder}.")
    text = f"---\n{metadata.to_yaml()}\n---\n\n{body}"
    _check_metadata(text, metadata)
    path = folder / "README.md"
    with atomic_file(path) as staged:
        staged.write_text(text, encoding="utf-8", newline="")
    return path


def _check_metadata(text, metadata):
    from huggingface_hub import ModelCard

    # `ModelCard.validate` would ask the Hub's server.
    problem = f"The metadata of the card does not read back: {metadata!r}"
    try:
        found = ModelCard(text).data.to_dict()
    except Exception as error:  # YAML errors are not ValueErrors.
        raise ValueError(f"{problem}: {error}") from error
    if found != metadata.to_dict():
        raise ValueError(f"{problem}; read: {found}")


def hub_model_id(preset: str | os.PathLike | None) -> str | None:
    """The Hub's `owner/name` of a preset's name or handle; `None` if it has none."""
    if preset is None:
        return None
    handles = [os.fspath(preset)]
    for row in presets():
        if handles[0] == row.name or handles[0] in row.sources:
            handles += row.sources
    for handle in handles:
        scheme, _, path = handle.partition("://")
        if scheme == "hf" and path.count("/") >= 1:
            return "/".join(path.split("/")[:2])
    return None


def _is_gemma(hub_id):
    owner, _, name = (hub_id or "").partition("/")
    return owner == "google" and "gemma" in name


def _description(base):
    start = f", trained from `{_one_line(base)}`" if base else ""
    return (
        f"An encoder-decoder of the T5Gemma architecture{start}, for Keras 3 on JAX,\n"
        "TensorFlow and PyTorch. It reads a text and writes another.\n"
    )


def _usage(folder):
    name = json.dumps(folder.resolve().name, ensure_ascii=False)
    return (
        "## Use\n\n"
        "With the path of this folder, or its handle once it is uploaded:\n\n"
        "```python\n"
        "import keras_t5gemma as kt\n\n"
        f"model = kt.Seq2SeqLM.from_preset({name})\n"
        'print(model.generate("a text of the kind it was trained on"))\n'
        "```\n"
    )


def _settings(training):
    if not training:
        return "No settings were recorded.\n"
    return _table([{"setting": k, "value": v} for k, v in training.items()])


def _mean(score):
    return score if isinstance(score, numbers.Number) else score["mean"]


def _score_table(scores):
    if not scores:
        return "None were measured.\n"
    rows = []
    for name, score in scores.items():
        row = {"measure": name, "value": f"{_mean(score):.4g}"}
        score = {} if isinstance(score, numbers.Number) else score
        error = score.get("standard_error")
        row["standard error"] = "" if error is None else f"{error:.2g}"
        if "before" in score:
            row["base"] = f"{score['before']:.4g}"
        rows.append(row)
    return _table(rows)


def _limits(scores):
    known = "the scores above are all that was measured" if scores else "it is untested"
    return (
        "## Limits\n\n"
        f"What it does outside its training data is not known: {known}. It can\n"
        "write what is wrong or harmful, as any such model can. Try it on your own\n"
        "texts before you rely on it.\n"
    )


def _table(rows):
    """Markdown of a list of dicts; the columns are the keys, in order."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[row.get(column, "") for column in columns] for row in rows]
    cells = ([_one_line(x).replace("|", "\\|") for x in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _one_line(value):
    return " ".join(str(value).split())

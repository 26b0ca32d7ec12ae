"""README.md of a preset: what it is, what it saw, what was measured."""

import json
import numbers
import os
from pathlib import Path

_LICENCE = """\
## Licence

Where the weights it was trained from are Gemma's, this model is a derivative of Gemma:
the Gemma Terms of Use (https://ai.google.dev/gemma/terms) apply to it and have to be
passed on with it. The licence of the training data is for its publisher to state.
"""


def write_model_card(folder, title, base, data, training, scores):
    """Write README.md into a preset's folder, as a whole or not at all.

    It states what it is given and nothing else. An earlier README.md is replaced.

    Args:
        folder: path of the preset.
        title: one line.
        base: the preset that the training started from; `None` leaves it out.
        data: list of dicts, one a file, such as `{"file": "train.jsonl", "rows": 100,
            "sha256": "..."}`; their keys are the columns of a table.
        training: dict of settings and their values.
        scores: what `score_texts` returns, or a dict of numbers. `before` in a score
            is what the base had.

    Returns:
        The path of the file.

    Raises:
        ValueError: when the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder` must be the folder of a preset; got {folder}.")
    parts = [
        "---\nlibrary_name: keras_t5gemma\npipeline_tag: text-generation\n---\n",
        f"# {_one_line(title)}\n",
        _what_it_is(base),
        _load(folder),
        "## Data\n\n" + (_table(data) if data else "None was recorded.\n"),
        "## Training\n\n" + _training(training),
        "## Scores\n\n" + _scores(scores),
        _limits(scores),
        _LICENCE,
    ]
    path = folder / "README.md"
    staged = folder / ".README.md.saving"
    try:
        with open(staged, "w", encoding="utf-8") as file:
            file.write("\n".join(parts))
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    return path


def _what_it_is(base):
    start = f", trained from `{_one_line(base)}`" if base else ""
    return (
        f"An encoder-decoder of the T5Gemma architecture{start}, for Keras 3 on JAX,\n"
        "TensorFlow and PyTorch. It reads a text and writes another.\n"
    )


def _load(folder):
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


def _training(training):
    if not training:
        return "No settings were recorded.\n"
    return _table([{"setting": k, "value": v} for k, v in training.items()])


def _scores(scores):
    if not scores:
        return "None were measured.\n"
    rows = []
    for name, score in scores.items():
        if isinstance(score, numbers.Number):
            score = {"mean": score}
        error = score.get("standard_error")
        row = {"measure": name, "value": f"{score['mean']:.4g}"}
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
        "write what is wrong or harmful, as any such model can. Try it on texts of\n"
        "your own before you rely on it.\n"
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

"""Scripts in experiments/ that prepare data for the package's commands."""

import gzip
import importlib.util
import json
from pathlib import Path

import pytest

from keras_t5gemma.evaluation.tasks import read_task

pytestmark = pytest.mark.one_backend
EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_splits(folder, rows):
    folder.mkdir(parents=True)
    for split in ("train", "valid", "test"):
        with gzip.open(folder / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def test_encoder_tasks_are_read_by_evaluate(tmp_path):
    rows = [{"id": 1, "text": "a", "section": "x", "summary": "b"}] * 150
    rows += [{"id": 2, "text": "c", "section": "y", "summary": "d"}] * 150
    rare = [{"id": 3, "text": "e", "section": "z", "summary": "f"}] * 149
    write_splits(tmp_path / "data/synopsis", [*rows, *rare])
    glosses = [{"text": t, "label": f"noun.{t}"} for t in "gh"]
    write_splits(tmp_path / "data/supersense", glosses)
    load("encoder_tasks").write_tasks(tmp_path / "data", tmp_path / "tasks")
    task = read_task("section", tmp_path / "tasks")
    assert task.class_names == ["x", "y"] and len(task.test) == 300
    task = read_task("synopsis", tmp_path / "tasks")
    assert task.kind == "retrieval" and len(task.test) == 449
    assert (task.test.x[0], task.test.y[0]) == ("b", "a")
    task = read_task("supersense", tmp_path / "tasks")
    assert (task.train.x, task.train.y) == (["g", "h"], ["noun.g", "noun.h"])


def test_encoder_tasks_name_the_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="supersense/train.jsonl.gz"):
        load("encoder_tasks").write_tasks(tmp_path, tmp_path / "tasks")

"""Run directories: files of a training, and whether it can be resumed."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras

from keras_t5gemma.checkpoints import saved_files
from keras_t5gemma.checkpoints.atomic import (
    atomic_file,
    atomic_folder,
    finish_interrupted_save,
    has_files,
)
from keras_t5gemma.checkpoints.folder_lock import folder_lock
from keras_t5gemma.training.callbacks import SaveBest
from keras_t5gemma.utils.checks import path as checked_path
from keras_t5gemma.utils.files import open_regular, read_json_file, sha256
from keras_t5gemma.utils.options import as_json, as_yaml

ADAPTERS_FILE = "adapters.lora.h5"
_ADDED = (ADAPTERS_FILE, "best.json", "README.md")  # To presets, after their save.


class RunDirectory:
    """Paths of a run, and its states: new, begun, trained, scored.

    Args:
        path: of the folder; it need not exist.

    Attributes:
        options: YAML of all options, which repeat the run: run.yaml.
        config: JSON of the options, library versions and data.
        log: CSV with one row per epoch.
        curves: plot of the log.
        samples: JSON lines, texts generated for some validation pairs each epoch, and
            for all pairs after training.
        backup: folder to resume from after an interruption.
        best: preset of the best epoch so far, or the mean of the last epochs.
        last: presets of the last epochs, until their mean is saved.
        preset: the result, present once training has finished.
        scores: JSON of the final scores, written last.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = checked_path(path, "output")
        self.options = self.path / "run.yaml"
        self.config = self.path / "config.json"
        self.log = self.path / "log.csv"
        self.curves = self.path / "curves.png"
        self.samples = self.path / "samples.jsonl"
        self.backup = self.path / "backup"
        self.best = self.path / "best"
        self.last = self.path / "last"
        self.preset = self.path / "preset"
        self.scores = self.path / "scores.json"

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Context in which no other process or thread writes the run directory.

        Raises:
            FolderInUseError: when entered while another one does.
        """
        if self.path.is_file():  # See `must_be_cleared`.
            return contextlib.nullcontext()
        return folder_lock(self.path)

    def is_trained(self) -> bool:
        """Whether the result has been saved."""
        finish_interrupted_save(self.preset)
        return (self.preset / "config.json").exists()

    def must_be_cleared(self, config: dict[str, Any], overwrite: bool) -> bool:
        """Whether existing results must be deleted before this run can begin.

        Args:
            config: contents of config.json for this run, see `describe`.
            overwrite: allow that.

        Raises:
            ValueError: for a file, a folder with other contents, a finished run, or a
                run with other options, naming them; the last two unless `overwrite`.
        """
        if self.path.is_file():
            raise ValueError(f"`output` {self.path} is a file; it must be a folder.")
        if not has_files(self.path):
            return False
        if "keras_t5gemma" not in _read_json(self.config):
            raise ValueError(
                f"`output` {self.path} is not a run directory of finetune or "
                "pretrain; choose another folder."
            )
        if not self._has_begun():
            return False  # Interrupted before there was anything to lose.
        differences = _differences(_read_json(self.config), config)
        if self.scores.exists() and not overwrite:
            raise ValueError(
                f"`output` {self.path} is a finished run; pass `overwrite` "
                "to replace it."
            )
        if differences and not overwrite:
            raise ValueError(
                f"`output` {self.path} is a run with other options: "
                f"{'; '.join(differences)}. Repeat those, choose another folder, or "
                "pass `overwrite` to replace it."
            )
        return bool(differences) or self.scores.exists()

    def _has_begun(self) -> bool:
        folders = (self.backup, self.best, self.preset)
        if any(map(has_files, folders)):
            return True
        return self.log.exists() and self.log.stat().st_size > 0

    def begin(self, command: str, config: dict[str, Any], clear: bool) -> None:
        """Create the folder, clear it where asked, and write its options.

        Args:
            command: name of the sub-command, for run.yaml.
            config: contents of config.json.
            clear: delete the results of an earlier run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if clear:  # config.json goes last: it marks the folder as a run directory.
            for folder in (self.backup, self.best, self.preset):
                saved_files.remove(folder, also=_ADDED)
            self.remove_last()
            for file in (
                self.scores,
                self.samples,
                self.curves,
                self.log,
                self.options,
                self.config,
            ):
                file.unlink(missing_ok=True)
        write_json(self.config, config)
        # Repeating a run must not delete it.
        options = {k: v for k, v in config["options"].items() if k != "overwrite"}
        _write(self.options, as_yaml(command, options))
        self._truncate_logs()

    def _truncate_logs(self) -> None:
        """Delete log lines after the last backup, and incomplete lines."""
        if self.backup.is_dir():
            finish_interrupted_save(self.backup)
        epoch = _read_json(self.backup / "progress.json").get("epoch", 0)

        def is_kept(line: str) -> bool:
            try:
                found = json.loads(line if line.startswith("{") else line.split(",")[0])
            except ValueError:
                return line.startswith("epoch,")  # The header of the log.
            return (found["epoch"] if isinstance(found, dict) else found) < epoch

        for path in (self.log, self.samples):
            if path.exists():
                kept = ""
                if epoch:
                    with open_regular(path) as file:
                        lines = io.TextIOWrapper(file, "utf-8", newline="\n")
                        kept = "".join(filter(is_kept, lines))
                _write(path, kept)

    def make_preset(self, model: keras.Model) -> None:
        """Write the result atomically: the best model if one was kept, else `model`."""
        finish_interrupted_save(self.best)
        with atomic_folder(self.preset) as staging:
            if not (self.best / "config.json").exists():
                save_model(model, staging)
                return
            shutil.copytree(
                self.best,
                staging,
                ignore=shutil.ignore_patterns("best.json", ".*"),
                copy_function=_link,
                dirs_exist_ok=True,
            )

    def remove_last(self) -> None:
        """Remove the presets of the last epochs."""
        for folder in sorted(self.last.glob("epoch-*")):
            saved_files.remove(folder)
        saved_files.remove_if_empty(self.last)

    def which_model(self) -> str:
        """Describe which epoch the result comes from."""
        best = _read_json(self.best / "best.json")
        if "mean_of" in best:
            return f"the mean of the models after epochs {best['mean_of']}"
        if not best:
            return "the model after the last epoch"
        return (
            f"the model after epoch {best['epoch'] + 1}, the best by "
            f"{best['monitor']} ({best['value']:.4g})"
        )

    def add_samples(
        self, split: str, pairs: Mapping[str, list[str]], answers: list[str]
    ) -> None:
        """Append the generated texts of all pairs of a file to samples.jsonl."""
        rows = zip(pairs["encoder_text"], pairs["decoder_text"], answers, strict=True)
        with open(self.samples, "a", encoding="utf-8") as file:
            for source, reference, answer in rows:
                row = {"split": split, "source": source}
                row |= {"reference": reference, "answer": answer}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


class MakePreset(keras.callbacks.Callback):
    """Write the result at the end of `fit`, before the backup is deleted."""

    def __init__(self, folder: RunDirectory) -> None:
        super().__init__()
        self.folder = folder

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        self.folder.make_preset(self.model)


class SaveBestOfRun(SaveBest):
    """`SaveBest` that also saves LoRA adapters."""

    def _save(self, folder):
        save_model(self.model, folder)


def save_model(model: keras.Model, folder: str | os.PathLike[str]) -> None:
    """Save a preset; LoRA adapters are merged into it and also saved separately."""
    model.save_to_preset(folder)
    if any(getattr(v, "name", "").startswith("lora_") for v in model.variables):
        model.save_lora_weights(str(Path(folder) / ADAPTERS_FILE))


def describe(
    options: dict[str, Any], files: Mapping[str, tuple[str | os.PathLike[str], int]]
) -> dict[str, Any]:
    """Contents of config.json: versions, options, and the data with its checksums.

    Args:
        options: all options.
        files: `{"train": (path, number of rows), ...}`.

    Returns:
        A dict of JSON values.
    """
    import keras_t5gemma

    return {
        "keras_t5gemma": keras_t5gemma.__version__,
        "keras": keras.__version__,
        "backend": keras.config.backend(),
        "options": as_json(options),
        "data": {split: _file(*file) for split, file in files.items()},
    }


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    _write(path, json.dumps(value, indent=4, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as staged:
        staged.write_text(text, encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = read_json_file(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _file(path: str | os.PathLike[str], rows: int) -> dict[str, Any]:
    return {"file": Path(path).name, "rows": rows, "sha256": sha256(path)}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Options and data that would make the rest of a run another training."""
    # Neither the location of files nor what is printed changes the result.
    free = {"output", "overwrite", "verbose", "save_freq", "train", "valid", "test"}

    def settings(config: dict[str, Any]) -> dict[str, Any]:
        options = config.get("options", {})
        values = {k: v for k, v in options.items() if k not in free}
        values["backend"] = config.get("backend")
        for split, file in config.get("data", {}).items():
            values[split] = file["sha256"]
        return values

    old, new = settings(old), settings(new)
    return [
        f"`{name}` is {old.get(name)!r} there, {new.get(name)!r} here"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]


def _link(source: str, target: str) -> str:
    """Hard link to a file that is never modified, or a copy where links fail."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return target
    return shutil.copy2(source, target)

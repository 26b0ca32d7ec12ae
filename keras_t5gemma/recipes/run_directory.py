"""The folder of a training: what lies in it, and whether to go on in it."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import keras

from keras_t5gemma.checkpoints.atomic import atomic_folder, finish
from keras_t5gemma.training.callbacks import SaveBest

ADAPTERS_FILE = "adapters.lora.h5"


class RunDirectory:
    """Paths of a run, and its states: new, begun, trained, scored.

    Args:
        path: of the folder; it need not exist.

    Attributes:
        config: JSON of the options, versions and data.
        log: CSV, one row an epoch.
        curves: picture of the log.
        samples: JSON lines, answers to some of the validation pairs every epoch, and
            to all pairs in the end.
        backup: folder to go on from after a stop.
        best: preset of the best epoch so far, or the mean of the last.
        last: presets of the last epochs, until there is their mean.
        preset: the result; there once the training is finished.
        scores: JSON of what was measured; written last.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.log = self.path / "log.csv"
        self.curves = self.path / "curves.png"
        self.samples = self.path / "samples.jsonl"
        self.backup = self.path / "backup"
        self.best = self.path / "best"
        self.last = self.path / "last"
        self.preset = self.path / "preset"
        self.scores = self.path / "scores.json"

    def is_trained(self):
        """Whether the result is there."""
        finish(self.preset)
        return (self.preset / "config.json").exists()

    def must_be_cleared(self, config, overwrite):
        """Whether what is there has to go before this run can begin.

        Args:
            config: dict of the run, see `describe`.
            overwrite: agree to that.

        Raises:
            ValueError: for a file, a folder of something else, a finished run, or a
                run of other options, with their names; the last two unless
                `overwrite`.
        """
        if self.path.is_file():
            raise ValueError(f"`output` {self.path} is a file; it must be a folder.")
        if not self.path.exists() or not any(self.path.iterdir()):
            return False
        if "keras_t5gemma" not in _read_json(self.config):
            raise ValueError(
                f"`output` {self.path} holds something else than a run of finetune "
                "or pretrain; take another folder."
            )
        if not self._has_begun():
            return False  # It was stopped before there was anything to lose.
        differences = _differences(_read_json(self.config), config)
        if self.scores.exists() and not overwrite:
            raise ValueError(
                f"`output` {self.path} is a finished run; pass `overwrite` "
                "(--overwrite) to replace it."
            )
        if differences and not overwrite:
            raise ValueError(
                f"`output` {self.path} is a run of other options: "
                f"{'; '.join(differences)}. Go on with those, take another folder, or "
                "pass `overwrite` (--overwrite) to replace it."
            )
        return bool(differences) or self.scores.exists()

    def _has_begun(self):
        folders = (self.backup, self.best, self.preset)
        if any(folder.is_dir() and any(folder.iterdir()) for folder in folders):
            return True
        return self.log.exists() and self.log.stat().st_size > 0

    def begin(self, config, clear):
        """Make the folder, empty if it is to be cleared, and note the run in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        if clear:  # What says that it is a run goes last.
            for folder in (self.backup, self.best, self.last, self.preset):
                shutil.rmtree(folder, ignore_errors=True)
            for file in (self.scores, self.samples, self.curves, self.log, self.config):
                file.unlink(missing_ok=True)
        write_json(self.config, config)
        self._forget_what_comes_again()

    def _forget_what_comes_again(self):
        """Drop what was logged after the last backup, and a line that was cut off."""
        if self.backup.is_dir():
            finish(self.backup)
        epoch = _read_json(self.backup / "progress.json").get("epoch", 0)

        def stays(line):
            try:
                found = json.loads(line if line.startswith("{") else line.split(",")[0])
            except ValueError:
                return line.startswith("epoch,")  # The header of the log.
            return (found["epoch"] if isinstance(found, dict) else found) < epoch

        for path in (self.log, self.samples):
            if path.exists():
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                _write(path, "".join(filter(stays, lines)) if epoch else "")

    def make_preset(self, model):
        """The result, all of it or none: the best model if one was kept, else this."""
        finish(self.best)
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

    def which_model(self):
        """What the result is, in words."""
        best = _read_json(self.best / "best.json")
        if "mean_of" in best:
            return f"the mean of the models after epochs {best['mean_of']}"
        if not best:
            return "the model after the last epoch"
        return (
            f"the model after epoch {best['epoch'] + 1}, the best by "
            f"{best['monitor']} ({best['value']:.4g})"
        )

    def add_samples(self, split, pairs, answers):
        """Append the answers to all pairs of a file."""
        rows = zip(pairs["encoder_text"], pairs["decoder_text"], answers, strict=True)
        with open(self.samples, "a", encoding="utf-8") as file:
            for source, reference, answer in rows:
                row = {"split": split, "source": source}
                row |= {"reference": reference, "answer": answer}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


class MakePreset(keras.callbacks.Callback):
    """Write the result at the end of `fit`, before the backup is removed."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_train_end(self, logs=None):
        self.folder.make_preset(self.model)


class SaveBestOfRun(SaveBest):
    """`SaveBest`, that keeps the adapters too."""

    def _save(self, folder):
        save_model(self.model, folder)


def save_model(model, folder):
    """A preset; of a model with adapters merged, and they beside it."""
    model.save_to_preset(folder)
    if any(getattr(v, "name", "").startswith("lora_") for v in model.variables):
        model.save_lora_weights(str(Path(folder) / ADAPTERS_FILE))


def describe(options, files):
    """What config.json says of a run.

    Args:
        options: dict of all options.
        files: `{"train": (path, rows), ...}`, what it reads.

    Returns:
        A dict of JSON values.
    """
    import keras_hub

    import keras_t5gemma

    config = {
        "keras_t5gemma": keras_t5gemma.__version__,
        "keras": keras.__version__,
        "keras_hub": keras_hub.__version__,
        "backend": keras.config.backend(),
        "options": options,
        "data": {split: _file(*file) for split, file in files.items()},
    }
    return json.loads(json.dumps(config, default=_name))


def write_json(path, value):
    """A JSON file, replaced as a whole or not at all."""
    _write(path, json.dumps(value, indent=4, ensure_ascii=False) + "\n")


def _write(path, text):
    staged = path.with_name(f".{path.name}.saving")
    try:
        with open(staged, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def _read_json(path):
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _file(path, rows):
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": Path(path).name, "rows": rows, "sha256": digest}


def _name(value):
    """Paths and functions among the options, as text."""
    return str(getattr(value, "__name__", value))


def _differences(old, new):
    """What would make the rest of a run another training, as lines."""
    # Where files lie and how a run is watched make no difference.
    free = {"output", "overwrite", "verbose", "save_freq", "train", "valid", "test"}

    def settings(config):
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


def _link(source, target):
    """A second name for a file that is never written again, where the disk can."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return target
    return shutil.copy2(source, target)

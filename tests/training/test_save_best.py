"""The best model so far, on disk."""

import json

import numpy as np
import pytest

from keras_t5gemma.checkpoints.checkpoint import open_checkpoint
from keras_t5gemma.training import callbacks
from keras_t5gemma.training.callbacks import SaveBest


def weights_in(folder, path):
    return open_checkpoint(folder).tensors()[path].read()


def test_save_best_keeps_the_best(model, tmp_path, monkeypatch):
    folder = tmp_path / "best"

    variable = model.backbone.weights[0]

    def end_of_epoch(value, epoch, callback):
        variable.assign(np.full(variable.shape, epoch))
        callback.on_epoch_end(epoch, {"val_loss": value})

    def saving():
        callback = SaveBest(folder)
        callback.set_model(model)
        callback.on_train_begin()
        return callback

    first = saving()
    for epoch, value in enumerate([np.nan, 3.0, 2.0, 2.5, np.nan, -np.inf]):
        end_of_epoch(value, epoch, first)
    assert (weights_in(folder, variable.path) == 2).all()
    noted = json.loads((folder / "best.json").read_text())
    assert noted == {"monitor": "val_loss", "mode": "min", "value": 2.0, "epoch": 2}

    resumed = saving()
    end_of_epoch(2.1, 6, resumed)
    assert (weights_in(folder, variable.path) == 2).all()
    with monkeypatch.context() as patch:  # The disk is full after the weights.
        patch.setattr(callbacks.json, "dumps", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            end_of_epoch(1.0, 7, resumed)
    assert (weights_in(folder, variable.path) == 2).all()
    assert json.loads((folder / "best.json").read_text()) == noted
    end_of_epoch(1.5, 8, resumed)
    assert (weights_in(folder, variable.path) == 8).all()
    hidden = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert hidden == [".saved_files.json"]

    with pytest.warns(
        UserWarning, match="'val_loss' is not in the logs.*accuracy, los"
    ):
        resumed.on_epoch_end(9, {"loss": 1.0, "accuracy": 0.0})
    resumed.on_epoch_end(10, {"loss": 1.0})  # Said once.
    with pytest.raises(ValueError, match="best model by .*val_loss.*got.*val_rougeL"):
        SaveBest(folder, "val_rougeL")


@pytest.mark.parametrize(
    ("arguments", "mode"),
    [
        (("val_loss",), "min"),
        (("perplexity",), "min"),
        (("val_rougeL",), "max"),
        (("val_mine", "max"), "max"),
    ],
)
def test_save_best_knows_the_direction(arguments, mode, tmp_path):
    callback = SaveBest(tmp_path, *arguments)
    callback.best = 1.0
    assert callback._is_better(0.5) == (mode == "min")
    assert callback._is_better(1.5) == (mode == "max")
    assert not callback._is_better(1.0)


@pytest.mark.parametrize("arguments", [("val_mine",), ("val_loss", "low")])
def test_save_best_refuses(arguments, tmp_path):
    with pytest.raises(ValueError, match="`mode` must be"):
        SaveBest(tmp_path, *arguments)

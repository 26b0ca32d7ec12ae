import sys

import keras
import numpy as np
import pytest

from keras_t5gemma.training.plots import plot_history

pytestmark = pytest.mark.one_backend
HISTORY = {
    "padding": [0.3, 0.3, 0.3],
    "accuracy": [0.1, 0.3, 0.4],
    "loss": [5.0, 4.0, 3.5],
    "val_loss": [5.1, 4.4, 4.2],
    "val_rouge1": [10.0, float("nan"), 30.0],
    "val_rougeL": [8.0, 9.0, 25.0],
    "val_accuracy": [0.1, 0.2, 0.3],
}


def panels(figure):
    """`{title: {label: (x, y)}}` of what was drawn."""
    return {
        axes.get_title(): {
            line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
            for line in axes.get_lines()
        }
        for axes in figure.axes
    }


def test_panels_of_a_dict(tmp_path):
    pytest.importorskip("matplotlib")
    paths = [tmp_path / f"curves.{kind}" for kind in ("png", "svg", "pdf")]
    for path in paths:
        figure = plot_history(HISTORY, path)
    starts = [path.read_bytes()[:5] for path in paths]
    assert starts == [b"\x89PNG\r", b"<?xml", b"%PDF-"]
    drawn = panels(figure)
    assert list(drawn) == ["loss", "accuracy", "rouge", "padding"]
    assert drawn["loss"] == {
        "training": ([1, 2, 3], HISTORY["loss"]),
        "validation": ([1, 2, 3], HISTORY["val_loss"]),
    }
    assert list(drawn["accuracy"]) == ["training", "validation"]
    assert list(drawn["rouge"]) == ["rouge1, validation", "rougeL, validation"]
    ticks = figure.axes[0].get_xticks()
    assert (ticks == np.round(ticks)).all()


def test_history_and_log_of_a_fit(tmp_path):
    pytest.importorskip("matplotlib")
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x = np.ones((4, 1))
    path = tmp_path / "log.csv"

    def fit(**kwargs):
        log = keras.callbacks.CSVLogger(path, append=True)
        return model.fit(x, x, verbose=0, callbacks=[log], **kwargs)

    fit(epochs=3, validation_data=(x, x), validation_freq=2)
    again = fit(epochs=4, initial_epoch=2, validation_data=(x, x))
    drawn = panels(plot_history(again))
    assert drawn["loss"]["training"] == ([3, 4], again.history["loss"])
    assert drawn["loss"]["validation"] == ([3, 4], again.history["val_loss"])
    logged = panels(plot_history(path))["loss"]
    # Epoch 3 was run twice: the second time counts.
    epochs, losses = logged["training"]
    assert epochs == [1, 2, 3, 4]
    assert losses[2:] == pytest.approx(again.history["loss"])
    assert np.isnan(logged["validation"][1][0])
    assert logged["validation"][1][2:] == pytest.approx(again.history["val_loss"])

    sometimes = model.fit(x, x, epochs=3, verbose=0, validation_data=(x, x))
    sometimes.history["val_loss"].pop()
    with pytest.raises(ValueError, match="2 values of 'val_loss' for 3 epochs"):
        plot_history(sometimes)


@pytest.mark.parametrize("history", [{}, None, [1.0, 2.0]])
def test_refuses_what_is_no_history(history):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="`history` must be what `fit` returns"):
        plot_history(history)


def test_refuses_files(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "log.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="log.csv must have a column 'epoch'"):
        plot_history(tmp_path / "log.csv")
    with pytest.raises(ValueError, match="`path` must end in.*png.*'x.doc'"):
        plot_history(HISTORY, "x.doc")


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_history(HISTORY)

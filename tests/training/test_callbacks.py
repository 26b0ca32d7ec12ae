import csv
import io
import json
import sys

import keras
import numpy as np
import pytest
import sacrebleu
from helpers.models import SENTENCES, numpy, tiny_config

import keras_t5gemma as kt
from keras_t5gemma.training import callbacks
from keras_t5gemma.training.callbacks import (
    GenerationMetrics,
    StopOnNaN,
    TrainingReport,
)
from keras_t5gemma.training.text_metrics import score_texts, text_metrics

SOURCES = [f"{s} {i}" for i in range(2) for s in SENTENCES]
TARGETS = [s.split()[-1] for s in SENTENCES] * 2


@pytest.fixture(scope="module")
def compiled(tokenizer):
    """One model for the file, with an average of its weights: compiled once."""
    keras.utils.set_random_seed(0)
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 32, 8)
    model = kt.Seq2SeqLM(kt.Backbone(tiny_config()), preprocessor)
    optimizer = keras.optimizers.AdamW(1e-2, use_ema=True, ema_momentum=0.6)
    model.compile(optimizer=optimizer)
    optimizer.build(model.trainable_variables)
    return model


@pytest.fixture
def model(compiled):
    variables = compiled.weights + compiled.optimizer.variables
    kept = [numpy(v).copy() for v in variables]
    yield compiled
    for variable, value in zip(variables, kept, strict=True):
        variable.assign(value)


class Data:
    """What `TrainingReport` and `StopOnNaN` ask of a dataset."""

    def __init__(self, counts, batch_size):
        self.all_counts, self.batch_size = counts, batch_size

    def counts(self, step):
        return self.all_counts[step]

    def rows(self, step):
        return list(range(step * self.batch_size, (step + 1) * self.batch_size))


def fit(model, **kwargs):
    options = {"batch_size": 4, "batching": "fixed", "shuffle": False, "verbose": 0}
    return model.fit(SOURCES, TARGETS, **options | kwargs)


def text_data(model, batch_size):
    x, _, _ = model.preprocessor({"encoder_text": SOURCES, "decoder_text": TARGETS})
    masks = np.hstack([x["encoder_padding_mask"], x["decoder_padding_mask"]])
    batches = [
        masks[i : i + batch_size].astype(bool) for i in range(0, len(masks), batch_size)
    ]
    return Data([(int(b.sum()), b.size) for b in batches], batch_size)


def test_fit_with_all_of_them(model, tmp_path, capsys):
    calls = []

    def how_often(predictions, references):
        assert len(predictions) == len(references) == 5
        calls.append(predictions)
        return {"calls": len(calls), "five": len(predictions)}

    def broken(predictions, references):
        raise RuntimeError("no such luck")

    class Generate(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.answers = self.model.generate(generation.sources, max_length=6)

    data, generate = text_data(model, 4), Generate()
    generation = GenerationMetrics(
        SOURCES,
        TARGETS,
        metrics=["exact_match", how_often, broken],
        every=3,
        max_rows=5,
        examples=2,
        samples=tmp_path / "samples.jsonl",
        max_length=6,
    )
    log = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    with pytest.warns(UserWarning, match="'broken' failed.*RuntimeError: no such luck"):
        history = fit(
            model,
            epochs=4,
            verbose=1,
            callbacks=[
                generation,
                generate,
                TrainingReport(data),
                StopOnNaN(data),
                log,
            ],
        ).history
    assert history["val_calls"] == [1, 1, 2, 3]  # Epochs 1, 3 and the last.
    assert history["val_five"] == [5] * 4
    assert np.isnan(history["val_broken"]).all()
    assert len(history["val_exact_match"]) == 4
    real, positions = np.sum(data.all_counts, axis=0)
    np.testing.assert_allclose(history["padding"], 1 - real / positions)
    assert min(history["tokens_per_second"]) > 0
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["val_calls"]) for row in rows] == [1, 1, 2, 3]
    assert float(rows[0]["padding"]) == history["padding"][0]

    lines = (tmp_path / "samples.jsonl").read_text("utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    assert [s["epoch"] for s in samples] == [0] * 5 + [2] * 5 + [3] * 5
    last = samples[-5:]
    assert len({s["source"] for s in last}) == 5
    pairs = dict(zip(SOURCES, TARGETS, strict=True))
    assert all(pairs[s["source"]] == s["reference"] for s in last)
    assert calls[-1] == generate.answers == [s["answer"] for s in last]

    printed = capsys.readouterr().out
    assert printed.count("5 answers after epoch") == 3
    assert printed.count(f"source     {last[0]['source']}\n") == 3
    assert printed.count("  answer  ") == 6
    assert f"padding: {history['padding'][0]:.4f}" in printed


def test_options_of_generate_fail_before_training(model):
    before = numpy(model.weights[0]).copy()
    generation = GenerationMetrics(SOURCES, TARGETS, metrics="bleu", num_baems=2)
    with pytest.raises(ValueError, match="Unknown options.*num_baems"):
        fit(model, callbacks=[generation])
    assert (numpy(model.weights[0]) == before).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": []}, "at least one; got 0 sources"),
        ({"x": {"encoder_text": [], "decoder_text": []}}, "got 0 sources"),
        ({"x": ["a", "b"], "y": ["c"]}, "got 2 sources and 1 targets"),
        ({"x": iter([("a", "b")])}, "in memory.*got <list_iterator"),
        ({"x": [("a", "b")], "every": 0}, "`every`.*from 1; got 0"),
        ({"x": [("a", "b")], "max_rows": 1.5}, "`max_rows`.*got 1.5"),
        ({"x": [("a", "b")], "metrics": "rogue"}, "among rouge.*got 'rogue'"),
        ({"x": [("a", "b")], "metrics": []}, "one or more"),
        ({"x": [("a", "b")], "num_return_sequences": 2}, "one answer"),
    ],
)
def test_generation_metrics_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        GenerationMetrics(**arguments)


def test_scores_of_rows():
    predictions = ["a small tool", "x y", " fonts "]
    references = ["a small disk", "q", "fonts"]
    scores = score_texts(predictions, references, ["rouge", "exact_match"])
    rows = np.array([200 / 3, 0, 100])
    for name in ("rouge1", "rougeL"):
        assert scores[name]["mean"] == pytest.approx(rows.mean())
        error = rows.std(ddof=1) / np.sqrt(3)
        assert scores[name]["standard_error"] == pytest.approx(error)
    # One of two bigrams; none; a single word has none.
    assert scores["rouge2"]["mean"] == pytest.approx(50 / 3)
    assert scores["exact_match"]["mean"] == pytest.approx(100 / 3)
    one = score_texts(["a"], ["a"], ["rouge", "bleu"])
    assert one["rouge1"] == {"mean": 100, "standard_error": None}
    assert one["bleu"]["standard_error"] is None


def test_scores_of_a_corpus():
    rng = np.random.default_rng(0)
    references = [" ".join(rng.choice(list("abcdefgh"), 9)) for _ in range(30)]
    predictions = [
        r if rng.random() < 0.5 else " ".join(reversed(r.split())) for r in references
    ]
    scores = score_texts(predictions, references, ["bleu", "chrf"])
    bleu = sacrebleu.corpus_bleu(predictions, [references]).score
    chrf = sacrebleu.corpus_chrf(predictions, [references]).score
    assert scores["bleu"]["mean"] == pytest.approx(bleu)
    assert scores["chrf"]["mean"] == pytest.approx(chrf)
    resampled = []
    for _ in range(200):
        rows = rng.integers(0, 30, 30)
        texts = [[column[i] for i in rows] for column in (predictions, references)]
        resampled.append(sacrebleu.corpus_bleu(texts[0], [texts[1]]).score)
    assert scores["bleu"]["standard_error"] == pytest.approx(np.std(resampled), rel=0.2)
    assert scores == score_texts(predictions, references, ["bleu", "chrf"])
    assert json.loads(json.dumps(scores)) == scores  # Numbers of Python's own.


def test_metrics_of_a_user():
    def length(predictions, references):
        return np.float32(sum(map(len, predictions)))

    assert score_texts(["ab", "c"], ["", ""], length) == {
        "length": {"mean": 3.0, "standard_error": None}
    }
    with pytest.raises(ValueError, match="different names.*length.*length"):
        text_metrics([length, length])
    with pytest.raises(ValueError, match="got 1 and 2"):
        score_texts(["a"], ["a", "b"])


def test_missing_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ImportError, match="pip install sacrebleu"):
        text_metrics("chrf")


def dense(steps_per_execution=1):
    if steps_per_execution > 1 and keras.config.backend() == "torch":
        pytest.skip("Keras has no steps_per_execution on PyTorch.")
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", steps_per_execution=steps_per_execution)
    return model


@pytest.mark.parametrize(
    ("steps_per_execution", "message"),
    [
        (1, r"loss is (nan|inf) at batch 3 of epoch 1 \(rows 4, 5 of the data\)"),
        (2, r"one of the batches 3 to 4 of epoch 1 \(rows 4, 5, 6, 7 of the data\)"),
        (3, r"one of the batches 1 to 3 .* \(rows 0, 1, 2, 3, 4, 5 of"),
    ],
)
def test_nan_stops_with_its_rows(steps_per_execution, message):
    x, y = np.ones((10, 1)), np.zeros((10, 1))
    y[5] = np.nan if steps_per_execution < 3 else np.inf
    with pytest.raises(FloatingPointError, match=message):
        dense(steps_per_execution).fit(
            x,
            y,
            batch_size=2,
            shuffle=False,
            verbose=0,
            callbacks=[StopOnNaN(Data([], 2))],
        )


def test_nan_of_the_token_loss(model):
    weights = np.ones(len(SOURCES))
    weights[6] = 3e38  # Overflows; NaN would be refused.
    with pytest.raises(
        FloatingPointError, match=r"batch 2 of epoch 1 \(rows 4, 5, 6, 7 of"
    ):
        fit(model, sample_weight=weights, callbacks=[StopOnNaN()])


@pytest.mark.parametrize("steps_per_execution", [1, 2])
def test_rate_leaves_compilation_out(monkeypatch, steps_per_execution):
    """A clock that only this test moves: every size is slow when it is new."""
    counts = [(30, 40), (30, 40), (30, 40), (10, 20), (18, 20)]
    seconds = iter([100, 2, 2, 50, 2] + [2] * 5)
    now = [0.0]

    class Work(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            for _ in range(min(batch + 1, 5) - self.first):
                now[0] += next(seconds)

        def on_train_batch_begin(self, batch, logs=None):
            self.first = batch

        def on_epoch_end(self, epoch, logs=None):
            now[0] += 1000  # Validation.

    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now[0])
    history = (
        dense(steps_per_execution)
        .fit(
            np.ones((10, 1)),
            np.ones((10, 1)),
            batch_size=2,
            epochs=2,
            verbose=0,
            callbacks=[Work(), TrainingReport(Data(counts, 2))],
        )
        .history
    )
    # New sizes come with batches 1 and 4; two steps an execution hide batch 2 and 3
    # behind them, which leaves batch 5.
    first = (30 + 30 + 18) / 6 if steps_per_execution == 1 else 18 / 2
    assert history["tokens_per_second"] == pytest.approx([first, 118 / 10])
    assert history["padding"] == pytest.approx([1 - 118 / 160] * 2)


def test_nothing_is_told_of_what_is_not_known():
    x = np.ones((4, 1))
    report = TrainingReport(Data([(0, 0)] * 2, 2))
    history = dense().fit(x, x, batch_size=2, verbose=0, callbacks=[report]).history
    assert list(history) == ["loss"]


def test_training_report_refuses():
    with pytest.raises(ValueError, match="`counts.step.`; got list"):
        TrainingReport([])


def test_average_of_the_weights_is_left_after_fit(model, capsys):
    """`use_ema` of Keras's optimizers, on our training step; in silence."""
    averages = []

    class Average(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            values = [numpy(v).copy() for v in self.model.trainable_variables]
            if averages:
                pairs = zip(averages[-1], values, strict=True)
                values = [0.6 * a + 0.4 * v for a, v in pairs]
            averages.append(values)

        def on_train_end(self, logs=None):
            averages.append([numpy(v) for v in self.model.trainable_variables])

    generation = GenerationMetrics(
        SOURCES, TARGETS, metrics="bleu", max_rows=5, max_length=6
    )
    history = fit(model, callbacks=[generation, Average()]).history
    assert len(history["val_bleu"]) == 1
    assert capsys.readouterr().out == ""
    *_, expected, left = averages
    for a, b in zip(expected, left, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert any(
        np.abs(a - b).max() > 1e-4 for a, b in zip(averages[0], left, strict=True)
    )


@pytest.mark.one_backend
def test_answers_on_a_console_of_few_characters(monkeypatch):
    """Training must not end because one cannot be printed."""
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    generation = GenerationMetrics(["\u3042 A"], ["B"])
    generation._last = {}
    generation._print(0, ["\u3042"])
    console.flush()
    printed = console.buffer.getvalue().decode("cp1252")
    assert "source     \\u3042 A" in printed and "answer     \\u3042" in printed

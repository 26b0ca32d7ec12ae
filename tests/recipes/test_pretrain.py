"""`keras-t5gemma pretrain`: the run, its stops, its options."""

import csv
import json

import keras
import numpy as np
import pytest
from helpers.models import SENTENCES, enlarge, numpy, one_block_config
from helpers.teacher import make_teacher

import keras_t5gemma as kt
from keras_t5gemma.cli import main
from keras_t5gemma.recipes import pretrain as module
from keras_t5gemma.recipes.pretrain import pretrain

# Its parts have tests on every backend.
pytestmark = pytest.mark.one_backend
TEXTS = [f"{s} {i} {t}" for i, s in enumerate(SENTENCES) for t in SENTENCES[:3]]
OPTIONS = {"batch_size": 2, "max_steps": 6, "steps_per_epoch": 3, "verbose": 0}


@pytest.fixture(scope="module")
def files(tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    (root / "a.txt").write_text("\n\n".join(TEXTS[4:]), encoding="utf-8")
    rows = [json.dumps({"body": text}) for text in TEXTS[:4]]
    (root / "b.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (root / "valid.txt").write_text("\n".join(SENTENCES), encoding="utf-8")
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 40, 32)
    model = kt.Seq2SeqLM(kt.Backbone(one_block_config()), preprocessor)
    enlarge(model.backbone)
    model.save_to_preset(root / "preset")
    return root


def run(files, output, **options):
    arguments = {"preset": files / "preset", "train": files / "a.txt"}
    return pretrain(**{**arguments, **OPTIONS, "output": str(output), **options})


def weights(folder):
    backbone = kt.Backbone.from_preset(folder)
    return {v.path: numpy(v) for v in backbone.weights}


def test_a_run_and_its_folder(files, tmp_path, capsys):
    arguments = ["pretrain", "--preset", str(files / "preset"), "--field", "body"]
    arguments += ["--train", str(files / "a.txt"), str(files / "b.jsonl")]
    arguments += [
        "--valid",
        str(files / "valid.txt"),
        "--output",
        str(tmp_path / "run"),
    ]
    arguments += ["--objective", "t5gemma2", "--batch-size", "2", "--max-steps", "6"]
    assert main.main([*arguments, "--learning-rate", "0.05", "--verbose", "2"]) == 0
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "log.csv", "curves.png", "scores.json", "preset"} <= names
    assert not names & {"last", "best"}
    with open(folder / "log.csv", encoding="utf-8") as file:
        log = list(csv.DictReader(file))
    assert len(log) == 6
    scores = json.loads((folder / "scores.json").read_text())["valid"]["loss"]
    assert abs(float(log[-1]["val_loss"]) - scores["mean"]) < 1e-4
    assert scores["mean"] < scores["before"]
    repeated = main.parse(["pretrain", "--config", str(folder / "run.yaml")]).command
    expected = main.parse([*arguments, "--learning-rate", "0.05"]).command
    assert vars(repeated) | {"config": None, "verbose": "auto"} == vars(expected)
    config = json.loads((folder / "config.json").read_text())
    assert config["data"]["train"]["rows"] == len(TEXTS) - 4
    assert config["data"]["train 2"]["rows"] == 4
    card = (folder / "preset/README.md").read_text(encoding="utf-8")
    assert "pretrained on a.txt" in card and "valid loss" in card
    assert "finetune --preset" in capsys.readouterr().out
    model = kt.Seq2SeqLM.from_preset(folder / "preset")
    assert model.preprocessor.objective is None
    assert isinstance(model.generate("A text", 5), str)


def test_a_stopped_run_goes_on(files, tmp_path, monkeypatch):
    run(files, tmp_path / "whole", average_last=2)

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if self.model.optimizer.iterations >= 5:
                raise KeyboardInterrupt

    callbacks = module._callbacks
    with monkeypatch.context() as patch:
        patch.setattr(module, "_callbacks", lambda *a: [*callbacks(*a), Stop()])
        with pytest.raises(KeyboardInterrupt):
            run(files, tmp_path / "stopped", average_last=2)
    run(files, tmp_path / "stopped", average_last=2)
    whole, stopped = (weights(tmp_path / f"{n}/preset") for n in ("whole", "stopped"))
    for path, array in whole.items():
        assert np.array_equal(array, stopped[path]), path
    with pytest.raises(ValueError, match="finished run"):
        run(files, tmp_path / "whole", average_last=2)


def test_the_seed_is_the_order(files, tmp_path):
    options = {"max_steps": 3, "optimizer": "adamw"}
    first, same, other = (
        weights(
            run(files, tmp_path / str(i), seed=s, **options) or tmp_path / f"{i}/preset"
        )
        for i, s in enumerate((0, 0, 1))
    )
    assert all(np.array_equal(array, same[path]) for path, array in first.items())
    assert any(not np.array_equal(array, other[p]) for p, array in first.items())


def test_the_result_can_be_the_mean_of_the_last(files, tmp_path, capsys):
    options = {"max_steps": 6, "steps_per_epoch": 2}
    saved = []
    average = module.average_presets

    def note(paths, folder, **kwargs):
        saved.extend(weights(path) for path in paths)
        average(paths, folder, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "average_presets", note)
        run(files, tmp_path / "run", average_last=2, verbose=2, **options)
    assert "the mean of the models after epochs [2, 3]" in capsys.readouterr().out
    assert len(saved) == 2 and not (tmp_path / "run/last").exists()
    for path, array in weights(tmp_path / "run/preset").items():
        mean = (saved[0][path] + saved[1][path]) / 2
        assert np.abs(array - mean).max() < 1e-6, path
    with pytest.raises(ValueError, match="take one"):
        run(files, tmp_path / "other", average_last=2, ema_momentum=0.9)


def test_a_teacher_live_or_on_disk(files, tokenizer, tmp_path):
    teacher = make_teacher()
    teacher.backbone.save_to_preset(str(tmp_path / "teacher"))
    assets = tmp_path / "teacher/assets/tokenizer"
    assets.mkdir(parents=True)
    (assets / "vocabulary.spm").write_bytes(tokenizer.proto)
    teach = {"teacher": str(tmp_path / "teacher"), "top_k": 8}
    run(files, tmp_path / "live", **teach)
    scores = {"teacher_scores": str(tmp_path / "scores"), **teach}
    run(files, tmp_path / "disk", **scores)
    assert (tmp_path / "scores/ids.npy").exists()
    del scores["teacher"]  # It need not be there any more.
    run(files, tmp_path / "again", **scores)
    live, disk, again = (
        weights(tmp_path / f"{name}/preset") for name in ("live", "disk", "again")
    )
    for path, array in disk.items():
        assert np.array_equal(array, again[path]), path
        assert np.abs(array - live[path]).max() < 2e-3, path
    with pytest.raises(ValueError, match="other texts"):
        run(files, tmp_path / "x", **scores, train=[str(files / "valid.txt")])
    with pytest.raises(ValueError, match="does not exist"):
        run(files, tmp_path / "x", teacher_scores=str(tmp_path / "none"))


def test_a_random_cross_attention_learns_first(files, tmp_path, monkeypatch):
    seen = []
    warm_up = module.CrossAttentionWarmUp
    monkeypatch.setattr(
        module, "CrossAttentionWarmUp", lambda n: seen.append(n) or warm_up(n)
    )
    opened = module.open_checkpoint(str(files / "preset"))
    run(files, tmp_path / "copied")
    assert seen == []
    lineage = {"needs_warm_up": True}
    monkeypatch.setattr(
        module, "open_checkpoint", lambda _: type("C", (), {"lineage": lineage})
    )
    assert opened.lineage is None
    run(files, tmp_path / "random", max_steps=10, epochs=9)
    run(files, tmp_path / "asked", cross_attention_steps=2)
    assert seen == [1, 2]


def test_bad_input_is_named_and_nothing_written(files, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    for options, message in (
        ({"train": str(tmp_path / "empty.txt")}, "no rows"),
        ({"train": str(tmp_path / "latin.txt")}, "UTF-8"),
        ({"train": []}, "`train`"),
        ({"objective": "mlm"}, "`objective`"),
        ({"top_k": 3}, "`top_k` needs"),
        ({"warmup_steps": 9}, "`warmup_steps` must be below"),
        ({"cross_attention_steps": 99}, "`cross_attention_steps` must be below"),
        ({"temperature": 2.0}, "`temperature` needs a `teacher`"),
        ({"label_weight": 0.5}, "`label_weight` needs a `teacher`"),
        ({"dtype": "int8"}, "`preset` must have float weights"),
        ({"encoder_sequence_length": 1, "decoder_sequence_length": 2}, "too short"),
    ):
        with pytest.raises(ValueError, match=message):
            run(files, tmp_path / "run", **options)
        assert not (tmp_path / "run").exists()
    with pytest.raises(FileNotFoundError):
        run(files, tmp_path / "run", train=str(tmp_path / "none.txt"))

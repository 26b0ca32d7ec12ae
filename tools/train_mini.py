"""Train the embedded presets with the paper's recipe.

    KERAS_BACKEND=jax python tools/train_mini.py --data DATA --runs RUNS

Decoder-only Gemma 2 models, a deep and a shallow one, are trained on plain text with
KerasHub's layers. They are adapted to a pair with a deep encoder and a shallow decoder,
which is pretrained with UL2 and PrefixLM and fine-tuned twice on package synopses; the
result is the mean of both. Copying from the encoder is what a small model learns last,
so some of the pretraining rows repeat a paragraph.

Made for one GPU, where it takes minutes (`--seconds` bounds the stages); on two CPU
cores it takes hours. A stage that is done is not repeated. At the end `RUNS` holds
`t5gemma_mini` and `t5gemma_mini_synopsis` in bfloat16; `tools/mini_cards.py` measures
them and writes their model cards.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT)]

import corpus  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402
import sources  # noqa: E402

import keras_t5gemma as kt  # noqa: E402
from keras_t5gemma.conversion.convert import convert  # noqa: E402
from keras_t5gemma.utils.ragged import Ragged  # noqa: E402

SHAPE = {"width": 192, "feed_forward": 384, "heads": 6, "kv_heads": 2}
ENCODER_LAYERS, DECODER_LAYERS = 6, 2
LENGTH = 128  # Tokens of the encoder and of the decoder in pretraining.
PREFIX, COPY = 0.4, 0.15  # Shares of the pretraining rows; the rest is UL2.
SYNOPSIS_LENGTHS = (224, 40)
ROUND = 50  # Steps between changes of the learning rate.


@dataclasses.dataclass
class Stage:
    """Steps, rows of a step, peak learning rate and maximum seconds of a training."""

    rounds: int
    rows: int
    rate: float
    seconds: float | None = None


def prepare(data, runs):
    """Token ids of all texts and pairs, `RUNS/tokens.npz`."""
    path = runs / "tokens.npz"
    if path.exists():
        return
    runs.mkdir(parents=True, exist_ok=True)
    tokenizer = corpus.tokenizer()
    train, held_out = corpus.read_documents(data)
    lines = [line for text in train["descriptions"] for line in text.split("\n")]
    texts = {
        "train": [f"{text}\n" for part in train.values() for text in part],
        "held_out": [text for part in held_out.values() for text in part],
        "paragraphs": [line for line in lines if 40 <= len(line) <= 400],
    }
    for split in ("train", "valid"):
        pairs = corpus.read_synopsis(data, split)
        texts[f"{split}_sources"] = pairs["encoder_text"]
        texts[f"{split}_targets"] = pairs["decoder_text"]
    arrays = {}
    for name, part in texts.items():
        rows = Ragged.from_rows(tokenizer.tokenize(part))
        arrays[name] = rows.values.astype("uint16")
        arrays[f"{name}_lengths"] = rows.lengths.astype("uint16")
    np.savez_compressed(path, **arrays)


def read(runs, name):
    """Rows of `RUNS/tokens.npz` as `Ragged`."""
    with np.load(runs / "tokens.npz") as arrays:
        lengths = arrays[f"{name}_lengths"].astype("int64")
        return Ragged(lengths, arrays[name].astype("int32"))


class Batches(keras.utils.PyDataset):
    """An endless data set of batches that a function makes from a random generator."""

    def __init__(self, make, workers=4):
        super().__init__(workers=workers, max_queue_size=4 * workers)
        self.make, self.round = make, 0

    def __len__(self):
        return ROUND

    def __getitem__(self, i):
        return self.make(np.random.default_rng([self.round, i]))

    def on_epoch_begin(self):
        self.round += 1


class CosineSchedule(keras.callbacks.Callback):
    """Linear warm-up, cosine decay over the rounds, or the seconds if these end first.

    The first round, which compiles, does not count.
    """

    def __init__(self, stage, log):
        super().__init__()
        self.stage, self.log, self.history = stage, log, []

    def on_epoch_begin(self, epoch, logs=None):
        now = time.perf_counter()
        if epoch <= 1:
            self.start = now
        done = epoch / self.stage.rounds
        if self.stage.seconds and epoch > 1:
            done = max(done, (now - self.start) / self.stage.seconds)
        warm = min(1.0, (epoch + 1) / 4)
        cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * min(done, 1))) / 2
        self.model.optimizer.learning_rate = self.stage.rate * warm * cosine
        if done >= 1:
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        seconds = time.perf_counter() - self.start
        self.history.append({"steps": (epoch + 1) * ROUND, "seconds": seconds, **logs})
        self.log.write_text(json.dumps(self.history, indent=1) + "\n")
        if epoch % 10 == 9:
            print(self.log.parent.name, json.dumps(self.history[-1]), flush=True)


def train(model, stage, make, valid, log):
    """Train a compiled model; the log of rounds."""
    log.parent.mkdir(parents=True, exist_ok=True)
    schedule = CosineSchedule(stage, log)
    keras.Model.fit(
        model,
        Batches(make),
        epochs=stage.rounds,
        callbacks=[schedule],
        verbose=0,
    )
    loss = evaluate(model, valid)
    schedule.history.append({"held_out_loss": loss})
    log.write_text(json.dumps(schedule.history, indent=1) + "\n")
    print(log.parent.name, "held-out loss", loss, flush=True)
    return schedule.history


def evaluate(model, valid):
    """Loss on `(x, y)` or `(x, y, sample_weight)`."""
    arrays = dict(zip(("x", "y", "sample_weight"), valid, strict=False))
    results = keras.Model.evaluate(model, **arrays, batch_size=256, verbose=0)
    return float(np.ravel(results)[0])


def adamw(rate):
    return keras.optimizers.AdamW(
        rate, weight_decay=0.01, beta_2=0.98, global_clipnorm=1.0
    )


def train_source(layers, runs, stage):
    """A decoder-only Gemma 2 trained on rows of 256 tokens."""
    folder = runs / f"source-{layers}"
    if (folder / "preset").exists():
        return
    keras.utils.set_random_seed(layers)
    stream = read(runs, "train").values
    source = sources.make_gemma2(layers=layers, dtype="mixed_bfloat16", **SHAPE)
    model = keras.Model(source.backbone.input, source.backbone.output)
    model.compile(adamw(stage.rate), sources.TokenLosses(source.backbone))

    def make(rng):
        starts = rng.integers(0, len(stream) - 257, stage.rows)
        return sources.inputs(stream[starts[:, None] + np.arange(257)])

    held = read(runs, "held_out").values
    held = held[: len(held) // 257 * 257].reshape(-1, 257)[:512]
    train(model, stage, make, sources.inputs(held), folder / "log.json")
    source.backbone.save_to_preset(str(folder / "preset"))
    assets = folder / "preset/assets/tokenizer"
    assets.mkdir(parents=True, exist_ok=True)
    (assets / "vocabulary.spm").write_bytes(corpus.tokenizer().proto)


def arrays_of(sources_, targets, lengths):
    """The backbone's inputs, labels and weights of rows of ids that fit `lengths`."""
    padded = []
    for rows, width in zip((sources_, targets), lengths, strict=True):
        ids = np.zeros((len(rows), width), "int32")
        used = np.arange(width) < np.minimum(rows.lengths, width)[:, None]
        kept = np.arange(len(rows.values)) - np.repeat(rows.starts, rows.lengths)
        ids[used] = rows.values[kept < width]
        padded += [ids, used]
    encoder, encoder_mask, labels, mask = padded
    decoder = np.concatenate([np.full((len(labels), 1), 2, "int32"), labels[:, :-1]], 1)
    x = {
        "encoder_token_ids": encoder,
        "encoder_padding_mask": encoder_mask.astype("int32"),
        "decoder_token_ids": decoder,
        "decoder_padding_mask": mask.astype("int32"),
    }
    return x, labels, mask.astype("float32")


def pretraining_rows(runs):
    """A function of a row count and a random generator: batches of the mixture."""
    stream = read(runs, "train").values
    paragraphs = read(runs, "paragraphs")
    paragraphs = paragraphs.take(np.flatnonzero(paragraphs.lengths < LENGTH))
    ul2 = kt.objectives.UL2.from_tokenizer(corpus.tokenizer())
    prefix = kt.objectives.PrefixLM()

    def windows(rng, rows, length):
        starts = rng.integers(0, len(stream) - length, rows)
        ids = stream[starts[:, None] + np.arange(length)]
        return Ragged(np.full(rows, length), ids.reshape(-1))

    def make(rows, rng):
        copies = round(COPY * rows)
        prefixes = round(PREFIX * rows)
        chosen = paragraphs.take(rng.integers(0, len(paragraphs), copies))
        seeds = rng.integers(0, 2**31, rows)
        parts = [
            (chosen, chosen),
            prefix(windows(rng, prefixes, 2 * LENGTH), seeds[:prefixes]),
            ul2(
                windows(
                    rng, rows - copies - prefixes, ul2.longest_text(LENGTH, LENGTH)
                ),
                seeds[copies + prefixes :],
            ),
        ]
        both = [Ragged.concatenate(side) for side in zip(*parts, strict=True)]
        return arrays_of(*both, (LENGTH, LENGTH))

    return make


def compiled(model, stage, smoothing=0.0):
    model.compile(
        optimizer=adamw(stage.rate),
        loss=kt.TokenCrossEntropy(label_smoothing=smoothing),
    )
    return model


def pretrain(runs, source, stage, start=None):
    """Adapt the sources, or take the preset `start`; pretrain: `RUNS/pretrained`."""
    folder = runs / "pretrained"
    if (folder / "preset").exists():
        return
    keras.utils.set_random_seed(0)
    if start is None:
        for layers in (ENCODER_LAYERS, DECODER_LAYERS):
            train_source(layers, runs, source)
        deep, shallow = (
            str(runs / f"source-{layers}/preset")
            for layers in (ENCODER_LAYERS, DECODER_LAYERS)
        )
        backbone = kt.adapt_gemma2(deep, shallow, dtype="mixed_bfloat16")
    else:
        backbone = kt.Backbone.from_preset(start, dtype="mixed_bfloat16")
    preprocessor = kt.Seq2SeqLMPreprocessor(corpus.tokenizer(), LENGTH, LENGTH)
    model = compiled(kt.Seq2SeqLM(backbone, preprocessor), stage)
    rows = pretraining_rows(runs)
    held = read(runs, "held_out")
    held = held.take(np.flatnonzero(held.lengths >= 2 * LENGTH))
    held = Ragged.from_rows([held[i][: 2 * LENGTH] for i in range(len(held))])
    valid = kt.objectives.PrefixLM()(held, np.arange(len(held)))
    valid = arrays_of(*valid, (LENGTH, LENGTH))
    before = evaluate(model, valid)
    log = folder / "log.json"
    history = train(model, stage, lambda rng: rows(stage.rows, rng), valid, log)
    history.append({"before": before})
    log.write_text(json.dumps(history, indent=1) + "\n")
    model.backbone.lineage["needs_warm_up"] = False
    model.save_to_preset(folder / "preset")
    convert(str(folder / "preset"), runs / "t5gemma_mini", dtype="bfloat16")


def finetune(runs, stage, dropout, smoothing, name):
    """Fine-tune on synopses: `RUNS/NAME`."""
    folder = runs / name
    if (folder / "preset").exists():
        return
    keras.utils.set_random_seed(1)
    model = with_dropout(runs / "pretrained/preset", dropout)
    compiled(model, stage, smoothing)
    pairs = [read(runs, f"train_{side}") for side in ("sources", "targets")]
    valid = [read(runs, f"valid_{side}") for side in ("sources", "targets")]

    def arrays(sources_, targets):
        ends = targets.ends
        ended = Ragged(targets.lengths + 1, np.insert(targets.values, ends, 1))
        return arrays_of(sources_, ended, SYNOPSIS_LENGTHS)

    def make(rng):
        chosen = rng.integers(0, len(pairs[0]), stage.rows)
        return arrays(*(side.take(chosen) for side in pairs))

    train(model, stage, make, arrays(*valid), folder / "log.json")
    tuned = with_dropout(runs / "pretrained/preset", 0.0)
    tuned.backbone.set_weights(model.backbone.get_weights())
    tuned.preprocessor.encoder_sequence_length = SYNOPSIS_LENGTHS[0]
    tuned.preprocessor.decoder_sequence_length = SYNOPSIS_LENGTHS[1]
    tuned.generation_defaults = {"no_repeat_ngram_size": 2, "repetition_penalty": 1.5}
    tuned.save_to_preset(folder / "preset")


def with_dropout(preset, rate):
    """A model of a preset with another dropout rate."""
    model = kt.Seq2SeqLM.from_preset(preset, dtype="mixed_bfloat16")
    config = dataclasses.replace(model.backbone.config, dropout=rate)
    backbone = kt.Backbone(
        config, dtype="mixed_bfloat16", lineage=model.backbone.lineage
    )
    backbone.set_weights(model.backbone.get_weights())
    return kt.Seq2SeqLM(backbone, model.preprocessor)


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--rounds", type=int, nargs=2, default=(6, 170))
    parser.add_argument("--rows", type=int, nargs=3, default=(256, 256, 128))
    parser.add_argument("--seconds", type=float, nargs=3, default=(None,) * 3)
    parser.add_argument("--rates", type=float, nargs=3, default=(3e-3, 3e-3, 1.5e-3))
    parser.add_argument("--tunings", type=int, nargs="*", default=(50, 75))
    parser.add_argument("--start", help="pretrained pair to continue from")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    args = parser.parse_args()
    prepare(args.data, args.runs)
    source, pretraining, tuning = (
        Stage(*options)
        for options in zip(
            (*args.rounds, None), args.rows, args.rates, args.seconds, strict=True
        )
    )
    pretrain(args.runs, source, pretraining, args.start)
    folders = []
    for i, rounds in enumerate(args.tunings):
        stage = dataclasses.replace(tuning, rounds=rounds)
        name = f"synopsis-{i + 1}"
        finetune(args.runs, stage, args.dropout, args.label_smoothing, name)
        folders.append(args.runs / name / "preset")
    kt.average_presets(folders, args.runs / "synopsis")
    output = args.runs / "t5gemma_mini_synopsis"
    convert(str(args.runs / "synopsis"), output, dtype="bfloat16")


if __name__ == "__main__":
    main()

"""Teach the embedded preset to translate synopses, English to Italian, with LoRA.

    python tools/translation_lora.py shared/data/translation --run runs/translation

The experiment behind guides/finetune_translation_lora.py, on real data: the folder
holds en-it.{train,valid,test}.jsonl.gz with the fields kind, en and it. The preset
has seen English only, so that Italian words are several of its pieces each. Scores are
BLEU and chrF (sacrebleu) with bootstrap standard errors, next to those of copying the
source, on the same rows. Killed and started again, it goes on where it was.
"""

import argparse
import gzip
import json
import math
import os
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras

import keras_t5gemma as kt
from keras_t5gemma.training.backup import BackupAndRestore
from keras_t5gemma.training.callbacks import GenerationMetrics
from keras_t5gemma.training.text_metrics import score_texts

PRESET = "t5gemma_mini_synopsis"
PROJECTIONS = ["query", "key", "value", "output", "gate", "up", "down"]
DECODER_LENGTH = 64  # The longest Italian synopsis has 62 pieces.
METRICS = ("bleu", "chrf")


def read_rows(path, kind):
    """`(English, Italian)` lists of one kind of text."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["kind"] == kind]
    return [row["en"] for row in rows], [row["it"] for row in rows]


def make_model(method, rank):
    """The preset with what is to learn made trainable."""
    model = kt.Seq2SeqLM.from_preset(PRESET)
    model.preprocessor.decoder_sequence_length = DECODER_LENGTH
    if method == "lora":
        model.enable_lora(rank, PROJECTIONS)
    elif method == "lora+embeddings":
        model.enable_lora(rank, [*PROJECTIONS, "token_embedding"])
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="folder of en-it.*.jsonl.gz")
    parser.add_argument("--run", type=Path, default=Path("runs/translation"))
    parser.add_argument(
        "--method", choices=("lora", "lora+embeddings", "full"), default="lora"
    )
    parser.add_argument("--kind", choices=("short", "para"), default="short")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--epochs", type=int, default=4, help="parts of the steps")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3, help="highest")
    parser.add_argument("--test-rows", type=int, default=1000)
    args = parser.parse_args()
    if not (args.data / "en-it.train.jsonl.gz").exists():
        parser.exit(0, f"skipped: there is no en-it.train.jsonl.gz in {args.data}\n")
    start = time.time(), time.process_time()
    args.run.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(0)
    train, valid, test = (
        read_rows(args.data / f"en-it.{split}.jsonl.gz", args.kind)
        for split in ("train", "valid", "test")
    )
    test = [column[: args.test_rows] for column in test]
    model = make_model(args.method, args.rank)
    weights = sum(math.prod(v.shape) for v in model.trainable_variables)
    print(f"{args.method}: {weights:,} of {model.count_params():,} weights learn")
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, args.steps, warmup_target=args.rate, warmup_steps=args.steps // 12
    )
    model.compile(
        optimizer=keras.optimizers.AdamW(
            rate, weight_decay=0.01, beta_2=0.98, global_clipnorm=1.0
        )
    )
    history = model.fit(
        *train,
        batch_size=args.batch_size,
        epochs=args.epochs,
        steps_per_epoch=args.steps // args.epochs,
        validation_data=tuple(column[:320] for column in valid),
        callbacks=[
            GenerationMetrics(*valid, METRICS, max_rows=100, examples=3),
            keras.callbacks.CSVLogger(str(args.run / "log.csv"), append=True),
            BackupAndRestore(args.run / "backup", save_freq=100),
        ],
        verbose=2,
    )
    if args.method != "full":
        model.save_lora_weights(args.run / "adapters.lora.h5")
    model.save_to_preset(args.run / "preset")
    (args.run / "history.json").write_text(json.dumps(history.history))

    answers = {
        "copying the source": test[0],
        "greedy": model.generate(test[0], batch_size=64),
        "4 beams": model.generate(test[0], batch_size=64, num_beams=4),
    }
    scores = {k: score_texts(v, test[1], METRICS) for k, v in answers.items()}
    print(f"| {len(test[0])} test rows | BLEU | chrF |\n|---|---|---|")
    for name, row in scores.items():
        cells = [f"{s['mean']:.1f} ± {s['standard_error']:.1f}" for s in row.values()]
        print(f"| {name} | {' | '.join(cells)} |")
    columns = zip(*test, answers["4 beams"], strict=True)
    for source, reference, answer in list(columns)[:12]:
        print(f"{source}\n  reference  {reference}\n  answer     {answer}")
    minutes = [(time.time() - start[0]) / 60, (time.process_time() - start[1]) / 60]
    print(f"{minutes[0]:.1f} minutes, {minutes[1]:.1f} of processor time")
    report = {"settings": vars(args), "minutes": minutes, "scores": scores}
    text = json.dumps(report | {"answers": answers["4 beams"]}, default=str, indent=1)
    (args.run / "report.json").write_text(text)


if __name__ == "__main__":
    main()

"""Fine-tune the embedded preset with LoRA to translate English to Italian synopses.

    python tools/translation_lora.py DATA/translation --run runs/translation

The experiment behind guides/finetune_translation_lora.py, on real data. The folder
holds en-it.{train,valid,test}.jsonl.gz with the fields kind, en and it. The preset was
trained on English only, so Italian words take several pieces each. Scores are BLEU and
chrF (sacrebleu) with bootstrap standard errors, next to the baseline of copying the
source. Started again after an interruption, it resumes.
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
    """Load the preset and make the weights of a method trainable."""
    model = kt.Seq2SeqLM.from_preset(PRESET)
    model.generation_defaults = None  # They are for summaries.
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
    methods = ("lora", "lora+embeddings", "full")
    parser.add_argument("--method", choices=methods, default="lora+embeddings")
    parser.add_argument("--kind", choices=("short", "para"), default="short")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument(
        "--epochs", type=int, default=3, help="parts that the steps are split into"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
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
    print(
        f"{args.method}: {weights:,} of {model.count_params():,} weights are trainable"
    )
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
            kt.callbacks.GenerationMetrics(*valid, METRICS, max_rows=100, examples=3),
            keras.callbacks.CSVLogger(str(args.run / "log.csv"), append=True),
            kt.callbacks.BackupAndRestore(args.run / "backup", save_freq=100),
        ],
        verbose=2,
    )
    if args.method != "full":
        model.save_lora_weights(args.run / "adapters.lora.h5")
    model.save_to_preset(args.run / "preset")
    (args.run / "history.json").write_text(json.dumps(history.history))

    evaluate(model, test, args, start)


def evaluate(model, test, args, start):
    """Score the baseline and the model; print and write results as they come."""
    sources, references = test
    writers = {
        "copying the source": lambda: sources,
        "greedy": lambda: model.generate(sources, batch_size=64),
        "4 beams": lambda: model.generate(sources, batch_size=64, num_beams=4),
    }
    report = {"settings": vars(args), "scores": {}}
    print(f"| {len(sources)} test rows | BLEU | chrF |\n|---|---|---|", flush=True)
    for name, write in writers.items():
        answers = write()
        scores = kt.score_texts(answers, references, METRICS)
        cells = [
            f"{s['mean']:.1f} ± {s['standard_error']:.1f}" for s in scores.values()
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        report["scores"][name] = scores
        report["minutes"] = (time.time() - start[0]) / 60
        report["processor minutes"] = (time.process_time() - start[1]) / 60
        report["answers"] = list(zip(sources, references, answers, strict=True))
        text = json.dumps(report, default=str, indent=1, ensure_ascii=False)
        (args.run / "report.json").write_text(text, encoding="utf-8")
    for row in report["answers"][:12]:
        print("\n  ".join(row))
    minutes = report["minutes"], report["processor minutes"]
    print("{:.1f} minutes since the start, {:.1f} of processor time".format(*minutes))


if __name__ == "__main__":
    main()

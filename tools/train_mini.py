"""Train the embedded presets by the paper's recipe, on a CPU.

    KERAS_BACKEND=jax python tools/train_mini.py --data DATA --runs RUNS

A decoder-only model with KerasHub (experiments/sources.py), adapted to a balanced pair,
pretrained with PrefixLM on plain text, fine-tuned on package synopses. A small model
learns last to copy from what its encoder has read, so a part of the plain text says
everything twice: then the half that is read is the half that is to be written.

Every step keeps backups: killed and started again, it goes on where it was. In the end
`RUNS/mini/finetuned/preset` and `RUNS/mini/pretrained/preset` are what
`keras-t5gemma convert --dtype bfloat16` turns into the embedded presets.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import corpus  # noqa: E402

import keras_t5gemma as kt  # noqa: E402
from keras_t5gemma.checkpoints.adapt import adapt_to_folder  # noqa: E402

SIZE = "large"
ONCE, TWICE = 6_000, 10_000  # Documents of the pretraining.


def write_mixture(data, folder):
    """Documents as they are, and short paragraphs that say it twice; held-out ones."""
    path = folder / "mixture.jsonl"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = corpus.read_documents(data)
    rng = random.Random(0)
    texts = rng.sample(train["descriptions"] + train["docs"], ONCE)
    lines = [line for text in train["descriptions"] for line in text.split("\n")]
    lines = [line for line in lines if 40 <= len(line) <= 400]
    texts += [f"{line}\n{line}" for line in rng.sample(lines, TWICE)]
    rng.shuffle(texts)
    valid = held_out["descriptions"][:200] + held_out["docs"][:200]
    for name, part in (("held-out", valid), ("mixture", texts)):
        rows = [json.dumps({"text": text}) + "\n" for text in part]
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    return path


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--pretraining-steps", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    common = ["--data", str(args.data), "--runs", str(args.runs)]
    sources = ROOT / "experiments/sources.py"
    subprocess.run([sys.executable, sources, SIZE, *common], check=True)
    folder = args.runs / "mini"
    source = args.runs / f"sources/{SIZE}/preset"
    adapted = folder / "adapted"
    if not (adapted / "config.json").exists():
        adapt_to_folder(str(source), folder=adapted)
    texts = write_mixture(args.data, folder)
    pretrained = folder / "pretrained"
    if not (pretrained / "scores.json").exists():
        kt.pretrain(
            str(adapted),
            [str(texts)],
            str(pretrained),
            [str(texts.with_name("held-out.jsonl"))],
            encoder_sequence_length=128,
            decoder_sequence_length=128,
            batch_size=8,
            max_steps=args.pretraining_steps,
            optimizer="adamw",
            learning_rate=2e-3,
            weight_decay=0.01,
            save_freq=100,
        )
    finetuned = folder / "finetuned"
    if not (finetuned / "scores.json").exists():
        data = args.data / "synopsis"
        kt.finetune(
            str(pretrained / "preset"),
            str(data / "train.jsonl.gz"),
            str(finetuned),
            str(data / "valid.jsonl.gz"),
            str(data / "test.jsonl.gz"),
            source="text",
            target="summary",
            encoder_sequence_length=224,
            decoder_sequence_length=40,
            epochs=args.epochs,
            optimizer="adamw",
            learning_rate=1.5e-3,
            schedule="cosine",
            warmup_steps=100,
            weight_decay=0.01,
            label_smoothing=0.1,
            monitor="val_loss",
            sample_rows=200,
            save_freq=100,
        )


if __name__ == "__main__":
    main()

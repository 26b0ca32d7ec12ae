"""Train the embedded presets by the paper's recipe, on a CPU.

    KERAS_BACKEND=jax python tools/train_mini.py --data DATA --runs RUNS

A decoder-only model with KerasHub (experiments/sources.py), adapted to a balanced pair,
pretrained with UL2 on all of the text, fine-tuned on package synopses. Every step keeps
backups: killed and started again, it goes on where it was. In the end
`RUNS/mini/finetuned/preset` and `RUNS/mini/pretrained/preset` are what
`keras-t5gemma convert --dtype bfloat16` turns into the embedded presets.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import run as experiments  # noqa: E402

import keras_t5gemma as kt  # noqa: E402
from keras_t5gemma.checkpoints.adapt import adapt_to_folder  # noqa: E402

SIZE = "large"


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--pretraining-steps", type=int, default=1200)
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
    texts = experiments.write_texts(args.data, args.runs)
    pretrained = folder / "pretrained"
    if not (pretrained / "scores.json").exists():
        kt.pretrain(
            str(adapted),
            [str(texts / "train.jsonl")],
            str(pretrained),
            [str(texts / "valid.jsonl")],
            objective="t5gemma2",
            encoder_sequence_length=192,
            decoder_sequence_length=192,
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

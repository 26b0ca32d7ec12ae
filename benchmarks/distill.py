"""Time and peak memory of a distillation step, against a plain training step.

    python benchmarks/distill.py [--folder F] [--backends torch jax tensorflow]

Model and measures of benchmarks/train.py (S-S, vocabulary 256,000, float32, AdamW).
`live` distills the full distribution of a random Gemma 2 of two layers and width 512
that runs in the step; `scores` distills 64 precomputed log-probabilities per token, as
`TeacherScores` reads them. The teacher's weights count as `base`, not as `above`; the
peak includes the teacher's construction.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import load
import numpy as np
import train

KINDS = ("plain", "live", "scores")
CHOICES = 64


def make_teacher():
    import keras_hub

    backbone = keras_hub.models.GemmaBackbone(
        vocabulary_size=256_000,
        num_layers=2,
        num_query_heads=8,
        num_key_value_heads=4,
        hidden_dim=512,
        intermediate_dim=2048,
        head_dim=64,
        query_head_dim_normalize=True,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        attention_logit_soft_cap=50.0,
        final_logit_soft_cap=30.0,
    )
    return keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=None)


def teacher_arrays(kind, x):
    """The arrays that `DocumentDataset` adds for a teacher."""
    shape = x["decoder_token_ids"].shape
    rng = np.random.default_rng(0)
    if kind == "scores":
        return {
            "teacher_ids": rng.integers(4, 256_000, (*shape, CHOICES), "int32"),
            "teacher_log_probs": -rng.random((*shape, CHOICES), "float32"),
            "teacher_places": np.zeros(shape, "int32"),
        }
    text = np.concatenate([x["encoder_token_ids"], x["decoder_token_ids"]], axis=1)
    return {"teacher_token_ids": text, "teacher_padding_mask": np.ones_like(text)}


def measure(kind, args):
    """Train in this process; print the results as JSON."""
    import keras

    import keras_t5gemma

    base = load.peak()
    loss = keras_t5gemma.TokenCrossEntropy()
    if kind == "live":
        teacher = make_teacher()
        loss = keras_t5gemma.Distillation(teacher)
        base += 4 * teacher.count_params()
    x, y = train.make_batches(1 + args.steps, args)
    if kind != "plain":
        x |= teacher_arrays(kind, x)
    if kind == "scores":
        # The step sees arrays only; tests cover the files.
        loss = keras_t5gemma.Distillation(None)
        loss.teacher = types.SimpleNamespace(top_k=CHOICES)
    if kind == "live":
        width = x["teacher_token_ids"].shape[1]
        first = np.arange(args.batch * (1 + args.steps)) % args.batch * width
        inside = args.source + np.arange(args.target)
        x["teacher_places"] = (first[:, None] + inside).astype("int32")
    backbone = keras_t5gemma.Backbone.from_preset(args.folder)
    model = keras_t5gemma.Seq2SeqLM(backbone)
    model.compile(optimizer=keras.optimizers.AdamW(1e-4), loss=loss)
    ends = train.keras_fit(model, x, y, args.batch)
    seconds = (ends[-1] - ends[0]) / args.steps
    print(json.dumps({"step": seconds, "peak": load.peak(), "base": base}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    train.add_sizes(parser)
    parser.add_argument("--backends", nargs="+", default=["torch", "jax", "tensorflow"])
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        measure(args.worker, args)
        return
    with tempfile.TemporaryDirectory() as scratch:
        args.folder = args.folder or Path(scratch) / "checkpoint"
        load.make_once(args.folder)
        print("| backend | step | s per step | base GB | above GB | x plain, peak |")
        print("|---" * 6 + "|")
        for backend in args.backends:
            plain = None
            for kind in KINDS:
                command = [sys.executable, __file__, "--worker", kind]
                for name in ("folder", "batch", "source", "target", "steps"):
                    command += [f"--{name}", str(getattr(args, name))]
                environment = {**os.environ, "KERAS_BACKEND": backend}
                done = subprocess.run(
                    command, capture_output=True, text=True, env=environment
                )
                if done.returncode:
                    raise SystemExit(done.stderr)
                r = json.loads(done.stdout.strip().splitlines()[-1])
                above = r["peak"] - r["base"]  # With weights, gradients, moments.
                plain = plain or above
                print(
                    f"| {backend} | {kind} | {r['step']:.1f} | {r['base'] / 1e9:.1f} "
                    f"| {(above - train.STATE) / 1e9:.1f} | {above / plain:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()

"""Time and peak memory of a training step at S-S size, against the peers.

    python benchmarks/train.py [--folder F] [--batch 4] [--source 256] [--target 128]

Loads a transformers folder of 312,517,632 random float32 weights (made where there is
none) in a fresh process a peer, and trains with AdamW on random ids without padding:
a step to compile and warm up, then `--steps` of them.

s a step      mean over the steps, the first left out.
peak GB       highest resident size of the process.
above GB      of it above weights, gradients and two moments (5.0 GB) and above what
              the process held before it loaded the model (`base`: the imports).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import load
import numpy as np

PEERS = (*load.PEERS, "keras_hub tensorflow")
PARAMETERS = 312_517_632
STATE = 4 * 4 * PARAMETERS  # Weights, gradients, two moments, in float32.


def make_batches(steps, args):
    """`(x, y)` for that many steps, ids `(steps * batch, length)`."""
    rng = np.random.default_rng(0)
    rows = steps * args.batch
    source = rng.integers(4, 256_000, (rows, args.source), "int32")
    target = rng.integers(4, 256_000, (rows, args.target + 1), "int32")
    x = {
        "encoder_token_ids": source,
        "encoder_padding_mask": np.ones_like(source),
        "decoder_token_ids": target[:, :-1],
        "decoder_padding_mask": np.ones_like(target[:, :-1]),
    }
    return x, target[:, 1:]


def keras_trainer(library, args):
    """A function of the number of steps that trains as long."""
    import keras

    optimizer = keras.optimizers.AdamW(1e-4)
    if library == "keras_hub":
        import keras_hub

        backbone = keras_hub.models.T5GemmaBackbone.from_preset(str(args.folder))
        model = keras_hub.models.T5GemmaSeq2SeqLM(backbone, preprocessor=None)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer=optimizer, loss=loss, weighted_metrics=["accuracy"])
    else:
        import keras_t5gemma

        backbone = keras_t5gemma.Backbone.from_preset(args.folder)
        model = keras_t5gemma.Seq2SeqLM(backbone)
        model.compile(optimizer=optimizer)

    def train(steps):
        x, y = make_batches(steps, args)
        weights = np.ones(y.shape, "float32")
        keras.Model.fit(
            model, x, y, sample_weight=weights, batch_size=args.batch, verbose=0
        )

    return train


def transformers_trainer(args):
    import torch
    from transformers import T5GemmaForConditionalGeneration

    model = T5GemmaForConditionalGeneration.from_pretrained(args.folder)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def train(steps):
        x, y = make_batches(steps, args)
        for start in range(0, len(y), args.batch):
            rows = slice(start, start + args.batch)
            optimizer.zero_grad()
            model(
                input_ids=torch.from_numpy(x["encoder_token_ids"][rows]),
                decoder_input_ids=torch.from_numpy(x["decoder_token_ids"][rows]),
                labels=torch.from_numpy(y[rows]).long(),
            ).loss.backward()
            optimizer.step()

    return train


def measure(peer, args):
    """Train in this process; print the results as JSON."""
    library, backend = peer.split()
    os.environ["KERAS_BACKEND"] = backend
    __import__(library)
    base = load.peak()
    is_keras = library.startswith("keras")
    train = keras_trainer(library, args) if is_keras else transformers_trainer(args)
    start = time.perf_counter()
    train(1)
    first = time.perf_counter() - start
    start = time.perf_counter()
    train(args.steps)
    seconds = (time.perf_counter() - start) / args.steps
    print(
        json.dumps({"first": first, "step": seconds, "peak": load.peak(), "base": base})
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--source", type=int, default=256, help="tokens")
    parser.add_argument("--target", type=int, default=128, help="tokens")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        measure(args.worker, args)
        return
    with tempfile.TemporaryDirectory() as scratch:
        if args.folder is None:
            args.folder = Path(scratch)
            load.make_folder(args.folder)
        print("| peer | s a step | first step s | peak GB | base GB | above GB |")
        print("|---" * 6 + "|")
        for peer in args.peers:
            command = [sys.executable, __file__, "--worker", peer]
            for name in ("folder", "batch", "source", "target", "steps"):
                command += [f"--{name}", str(getattr(args, name))]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                why = done.stderr.strip().splitlines() or ["killed"]
                print(f"| {peer} | failed: {why[-1][:60]} | | | | |", flush=True)
                continue
            r = json.loads(done.stdout.strip().splitlines()[-1])
            above = r["peak"] - STATE - r["base"]
            print(
                f"| {peer} | {r['step']:.1f} | {r['first']:.1f} "
                f"| {r['peak'] / 1e9:.1f} | {r['base'] / 1e9:.1f} "
                f"| {above / 1e9:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""Time and peak memory of a training step at S-S size, against peers.

    python benchmarks/train.py [--folder F] [--batch 4] [--source 256] [--target 128]
    python benchmarks/train.py --grow train.png --peers "keras_t5gemma torch" ...

Loads a transformers folder of 312,517,632 random float32 weights (made on first use) in
a fresh process per peer, and trains with AdamW on random ids without padding: one step
to compile, then `--steps` more in the same `fit`.

s per step    mean over the steps after the first.
first step s  from the call of `fit` to the end of the first step, with compilation.
peak GB       highest resident size of the process.
above GB      peak minus weights, gradients and two moments (5.0 GB), and minus the
              process's size before it loaded the model (`base`: the imports).

"remat" is `compile(rematerialize=True)`. `--grow` measures batches of 1, 2 and 4 pairs
and targets of 64, 128 and 256 tokens, and plots `above`.
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

REMAT = tuple(f"keras_t5gemma {b} remat" for b in ("jax", "torch", "tensorflow"))
PEERS = (*load.PEERS, "keras_hub tensorflow", *REMAT)
GROWTH = {"batch": (1, 2, 4), "target": (64, 128, 256)}
PARAMETERS = 312_517_632
STATE = 4 * 4 * PARAMETERS  # Weights, gradients, two moments, in float32.


def make_batches(steps, args):
    """`(x, y)` for `steps` steps, ids `(steps * batch, length)`."""
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


def keras_trainer(library, args, rematerialize=False):
    """A function that trains for a number of steps and returns their end times."""
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
        model.compile(optimizer=optimizer, rematerialize=rematerialize)

    def train(steps):
        return keras_fit(model, *make_batches(steps, args), args.batch)

    return train


def keras_fit(model, x, y, batch):
    """Train on arrays in order; return the end time of each step."""
    import keras

    class Clock(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.ends = []

        def on_train_batch_end(self, batch, logs=None):
            self.ends.append(time.perf_counter())

    clock = Clock()
    keras.Model.fit(
        model,
        x,
        y,
        sample_weight=np.ones(y.shape, "float32"),
        batch_size=batch,
        callbacks=[clock],
        shuffle=False,
        verbose=0,
    )
    return clock.ends


def transformers_trainer(args):
    import torch
    from transformers import T5GemmaForConditionalGeneration

    model = T5GemmaForConditionalGeneration.from_pretrained(args.folder)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def train(steps):
        x, y = make_batches(steps, args)
        ends = []
        for start in range(0, len(y), args.batch):
            rows = slice(start, start + args.batch)
            optimizer.zero_grad()
            model(
                input_ids=torch.from_numpy(x["encoder_token_ids"][rows]),
                decoder_input_ids=torch.from_numpy(x["decoder_token_ids"][rows]),
                labels=torch.from_numpy(y[rows]).long(),
            ).loss.backward()
            optimizer.step()
            ends.append(time.perf_counter())
        return ends

    return train


def measure(peer, args):
    """Train in this process; print the results as JSON."""
    library, backend, *options = peer.split()
    os.environ["KERAS_BACKEND"] = backend
    __import__(library)
    base = load.peak()
    is_keras = library.startswith("keras")
    if is_keras:
        train = keras_trainer(library, args, *map(bool, options))
    else:
        train = transformers_trainer(args)
    start = time.perf_counter()
    ends = train(1 + args.steps)
    first = ends[0] - start
    seconds = (ends[-1] - ends[0]) / args.steps
    print(
        json.dumps({"first": first, "step": seconds, "peak": load.peak(), "base": base})
    )


def run(peer, args, **changes):
    """Results of one peer in a separate process, or its error message."""
    command = [sys.executable, __file__, "--worker", peer]
    for name in ("folder", "batch", "source", "target", "steps"):
        command += [f"--{name}", str(changes.get(name, getattr(args, name)))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["killed"])[-1][:60]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    result["above"] = result["peak"] - STATE - result["base"]
    return result


def compare(args):
    """Print a table with one row per peer."""
    print("| peer | s per step | first step s | peak GB | base GB | above GB |")
    print("|---" * 6 + "|")
    for peer in args.peers:
        r = run(peer, args)
        if isinstance(r, str):
            print(f"| {peer} | failed: {r} | | | | |", flush=True)
            continue
        print(
            f"| {peer} | {r['step']:.1f} | {r['first']:.1f} | {r['peak'] / 1e9:.1f} "
            f"| {r['base'] / 1e9:.1f} | {r['above'] / 1e9:.1f} |",
            flush=True,
        )


def grow(args):
    """Print and plot memory by batch size and by target length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    print(
        "| peer | " + " | ".join(f"{k} {n}" for k in GROWTH for n in GROWTH[k]) + " |"
    )
    print("|---" * 7 + "|")
    panels = dict(zip(GROWTH, figure.subplots(1, 2, sharey=True), strict=True))
    for peer in args.peers:
        cells = []
        for name, sizes in GROWTH.items():
            runs = [run(peer, args, **{name: size}) for size in sizes]
            above = [np.nan if isinstance(r, str) else r["above"] / 1e9 for r in runs]
            cells += [f"{gb:.1f}" for gb in above]
            panels[name].plot(sizes, above, marker="o", label=peer)
        print(f"| {peer} | " + " | ".join(cells) + " |", flush=True)
    labels = {"batch": "pairs per batch", "target": "decoder tokens"}
    for name, panel in panels.items():
        panel.set(xlabel=labels[name], xticks=GROWTH[name], ylim=(0, None))
    panels["batch"].set_ylabel("GB above weights, gradients, moments")
    panels["batch"].legend()
    figure.savefig(args.grow)


def add_sizes(parser):
    """Add the arguments that set the size of a step."""
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--source", type=int, default=256, help="tokens")
    parser.add_argument("--target", type=int, default=128, help="tokens")
    parser.add_argument("--steps", type=int, default=3)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_sizes(parser)
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    parser.add_argument(
        "--grow", metavar="FILE", help="measure memory growth and plot it"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        measure(args.worker, args)
        return
    with tempfile.TemporaryDirectory() as scratch:
        args.folder = args.folder or Path(scratch) / "checkpoint"
        load.make_once(args.folder)
        grow(args) if args.grow else compare(args)


if __name__ == "__main__":
    main()

"""Time and peak memory of an InfoNCE step, with and without gradient caching.

    KERAS_BACKEND=torch python benchmarks/contrastive.py [--batch 256] [--cache 32]

The encoder of the embedded preset, pairs of random texts of `--length` tokens, AdamW,
one process per case. `above` is the peak minus the peak before the first step.
"""

import argparse
import json
import subprocess
import sys

import load
import numpy as np


def measure(args):
    """Train in this process; print the results as JSON."""
    import keras
    from train import keras_fit

    import keras_t5gemma as kt

    model = kt.TextEmbedder.from_preset("t5gemma_mini")
    model.compile(keras.optimizers.AdamW(1e-4), gradient_cache_rows=args.cache)
    rng = np.random.default_rng(0)
    rows = args.batch * (1 + args.steps)
    model._parts = 1 if args.cache is None else args.batch // args.cache
    x = {}
    for side in ("encoder", "positive"):
        ids = rng.integers(4, 8192, (rows, args.length), "int32")
        x |= {f"{side}_token_ids": ids, f"{side}_padding_mask": np.ones_like(ids)}
    before = load.peak()
    ends = keras_fit(model, x, np.zeros(rows, "int32"), args.batch)
    seconds = (ends[-1] - ends[0]) / args.steps
    print(json.dumps({"seconds": seconds, "above": load.peak() - before}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=256, help="pairs")
    parser.add_argument("--cache", type=int, default=32, help="rows at a time")
    parser.add_argument("--length", type=int, default=64, help="tokens")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--worker", choices=("whole", "cached"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        args.cache = None if args.worker == "whole" else args.cache
        measure(args)
        return
    print("| step | s | above GB |\n|---|---|---|")
    for kind in ("whole", "cached"):
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", kind]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        r = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"| {kind} | {r['seconds']:.1f} | {r['above'] / 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    main()

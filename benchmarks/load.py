"""Time and peak memory of loading an S-S checkpoint, against peers.

    python benchmarks/load.py [--folder F] [--repeats 3]

Makes a transformers folder of 312,517,632 random float32 weights (1.25 GB) on first
use, loads it in a fresh process per run, peers interleaved, and prints medians. Peak
memory is the highest resident size of the process, imports included; `base` is that
before loading. The file is in the page cache. `keras_t5gemma encoder` loads the encoder
only, with `encoder_only=True`: 46 % of the weights.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEERS = (
    "keras_t5gemma jax",
    "keras_t5gemma torch",
    "keras_t5gemma tensorflow",
    "keras_t5gemma encoder jax",
    "keras_t5gemma encoder torch",
    "keras_t5gemma encoder tensorflow",
    "keras_hub jax",
    "keras_hub torch",
    "transformers torch",
)


def make_folder(folder):
    """Save an S-S model with random weights in transformers' format."""
    import torch
    import transformers

    stack = {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
    }
    torch.manual_seed(0)
    config = transformers.T5GemmaConfig(encoder=stack, decoder=dict(stack))
    transformers.T5GemmaForConditionalGeneration(config).save_pretrained(folder)


def peak():
    """Highest resident size of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load(peer, folder):
    """Load in this process; print seconds and peaks as JSON."""
    library, *part, backend = peer.split()
    os.environ["KERAS_BACKEND"] = backend
    if library == "transformers":
        import transformers

        def run():
            return transformers.T5GemmaForConditionalGeneration.from_pretrained(folder)
    elif library == "keras_hub":
        import keras_hub

        def run():
            return keras_hub.models.T5GemmaBackbone.from_preset(folder)
    else:
        import keras_t5gemma

        def run():
            only = bool(part)
            return keras_t5gemma.Backbone.from_preset(folder, encoder_only=only)

    base = peak()
    start = time.perf_counter()
    model = run()
    seconds = time.perf_counter() - start
    assert model is not None
    print(json.dumps({"seconds": seconds, "base": base, "peak": peak()}))


def measure(peer, folder):
    """Load once in a fresh process; `None` if the peer fails, e.g. is not installed."""
    command = [sys.executable, __file__, "--peer", peer, "--folder", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        print(f"{peer}: {result.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(result.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="part of the peers' names")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        load(args.peer, str(args.folder))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        if not (folder / "config.json").exists():
            make_folder(folder)
        weights = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        runs = {peer: [] for peer in PEERS if args.only in peer}
        for _ in range(args.repeats):
            for peer in runs:
                runs[peer].append(measure(peer, folder))
    print(f"weights {weights / 1e9:.2f} GB, {args.repeats} runs each, medians\n")
    print("| peer | seconds | peak GB | peak / weights | before loading, GB |")
    print("|---|---|---|---|---|")
    for peer, results in runs.items():
        results = [r for r in results if r is not None]
        if results:
            seconds, base, top = (
                statistics.median(r[key] for r in results)
                for key in ("seconds", "base", "peak")
            )
            print(
                f"| {peer} | {seconds:.2f} | {top / 1e9:.2f} | {top / weights:.2f} | "
                f"{base / 1e9:.2f} |"
            )


if __name__ == "__main__":
    main()

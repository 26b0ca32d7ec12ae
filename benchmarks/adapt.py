"""Time, memory and disk traffic of `adapt`, at two sizes a factor 8 apart.

    python benchmarks/adapt.py [--folder F] [--repeats 3]

Makes two Gemma 2 checkpoints in transformers' format, bfloat16, random values, with
the same largest tensor (the embedding table) and 4 and 32 times as many layers, so
that the blocks are a factor 8 apart; adapts each of them file to file in a fresh
process, with and without the check of the result, and prints medians. Bytes are what
the process asked the kernel to read and write (/proc/self/io), imports excluded; `base`
is its resident size when it starts, imports done, `peak` the highest from then on.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WIDTH, VOCABULARY, LAYERS = 1024, 32_768, (4, 32)


def make_folder(folder, layers):
    """A Gemma 2 of random bfloat16 weights, written shard by shard."""
    import ml_dtypes
    import numpy as np

    from keras_t5gemma.checkpoints import safetensors_file, weight_maps
    from keras_t5gemma.checkpoints.tensors import FreshTensor, ToTheirs
    from keras_t5gemma.config import StackConfig

    stack = StackConfig(layers, WIDTH, 4 * WIDTH, 8, 4, 128)
    shapes = weight_maps.tower_shapes(stack, VOCABULARY)
    rows = weight_maps.expand(weight_maps.GEMMA2_HUGGING_FACE, layers)
    dtype = np.dtype(ml_dtypes.bfloat16)
    tensors = {
        theirs: ToTheirs(FreshTensor(ours, shapes[ours], dtype, 0.02, 0), rule, 128)
        for ours, (theirs, rule) in rows.items()
    }
    folder.mkdir(parents=True)
    safetensors_file.write_folder(folder, tensors, 1e9, lambda names, data: None)
    config = {
        "model_type": "gemma2",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "query_pre_attn_scalar": 128,
    }
    (folder / "config.json").write_text(json.dumps(config))


def traffic():
    """Bytes this process has read and written so far."""
    rows = dict(line.split(": ") for line in open("/proc/self/io"))
    return int(rows["rchar"]), int(rows["wchar"])


def resident(field):
    """VmRSS (now) or VmHWM (highest) of this process, bytes."""
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(field)


def adapt(source, target, check):
    """Adapt in this process; print what it took as JSON."""
    from keras_t5gemma.checkpoints.adapt import adapt_to_folder

    Path("/proc/self/clear_refs").write_text("5")  # Forget the imports' peak.
    base = resident("VmRSS")
    before, start = traffic(), time.perf_counter()
    adapt_to_folder(source, folder=target, check=check)
    seconds = time.perf_counter() - start
    read, wrote = (b - a for a, b in zip(before, traffic(), strict=True))
    peak = resident("VmHWM")
    keys = ("seconds", "read", "wrote", "base", "peak")
    print(json.dumps(dict(zip(keys, (seconds, read, wrote, base, peak), strict=True))))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.source:
        adapt(args.source, args.folder, args.check)
        return
    largest = 2 * VOCABULARY * WIDTH
    print(f"largest tensor {largest / 1e6:.0f} MB; medians of {args.repeats}\n")
    print(
        "| layers | check | source GB | result GB | s | read GB | written GB ", end=""
    )
    print("| base GB | peak - base GB |\n|" + "---|" * 9)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        for layers in LAYERS:
            source, target = Path(scratch, f"source{layers}"), Path(scratch, "result")
            make_folder(source, layers)
            for check in (False, True):
                runs = []
                for _ in range(args.repeats):
                    command = [sys.executable, __file__, "--source", str(source)]
                    command += ["--folder", str(target), *(["--check"] * check)]
                    out = subprocess.run(command, stdout=subprocess.PIPE, check=True)
                    runs.append(json.loads(out.stdout.splitlines()[-1]))
                    size = sum(f.stat().st_size for f in target.rglob("*.h5"))
                    shutil.rmtree(target)
                median = {k: statistics.median(r[k] for r in runs) for k in runs[0]}
                held = sum(f.stat().st_size for f in source.rglob("*.safetensors"))
                print(
                    f"| {layers} | {'yes' if check else 'no'} | {held / 1e9:.2f} | "
                    f"{size / 1e9:.2f} | {median['seconds']:.2f} | "
                    f"{median['read'] / 1e9:.2f} | {median['wrote'] / 1e9:.2f} | "
                    f"{median['base'] / 1e9:.2f} | "
                    f"{(median['peak'] - median['base']) / 1e9:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()

"""Time, memory and disk traffic of `adapt`, for models a factor 8 apart in size.

    python benchmarks/adapt.py [--folder F] [--repeats 3]
    python benchmarks/adapt.py --pair 9b 2b

Makes Gemma 2 checkpoints in transformers' format with random bfloat16 values, the same
largest tensor (the embedding table) and 4 and 32 layers. Adapts each of them from file
to file in a fresh process, with and without checking the result, and prints medians.
With `--pair` it does so once, at released sizes (9b 2b needs 50 GB of disk). Bytes are
those that the process asked the kernel to read and write (/proc/self/io) after its
imports; `base` is its resident size after the imports, `peak` the highest from then on.
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

SMALL_VOCABULARY, LAYERS = 32_768, (4, 32)


def make_folder(folder, stack, vocabulary_size):
    """Write a Gemma 2 with random bfloat16 weights, tensor by tensor."""
    import ml_dtypes
    import numpy as np

    from keras_t5gemma.checkpoints import safetensors_file, weight_maps
    from keras_t5gemma.checkpoints.lazy_tensors import ExportedTensor, FreshTensor

    shapes = weight_maps.tower_shapes(stack, vocabulary_size)
    rows = weight_maps.expand(weight_maps.GEMMA2_HUGGING_FACE, stack.num_layers)
    dtype = np.dtype(ml_dtypes.bfloat16)
    tensors = {
        name: ExportedTensor(
            FreshTensor(path, shapes[path], dtype, 0.02, 0), transform, stack.head_dim
        )
        for path, (name, transform) in rows.items()
    }
    folder.mkdir(parents=True)
    safetensors_file.write_folder(folder, tensors, 5e9, lambda names, data: None)
    config = {
        "model_type": "gemma2",
        "vocab_size": vocabulary_size,
        "hidden_size": stack.hidden_dim,
        "intermediate_size": stack.intermediate_dim,
        "num_hidden_layers": stack.num_layers,
        "num_attention_heads": stack.num_query_heads,
        "num_key_value_heads": stack.num_key_value_heads,
        "head_dim": stack.head_dim,
        "query_pre_attn_scalar": stack.head_dim,
    }
    (folder / "config.json").write_text(json.dumps(config))


def traffic():
    """Bytes this process has read and written so far."""
    rows = dict(line.split(": ") for line in open("/proc/self/io"))
    return int(rows["rchar"]), int(rows["wchar"])


def resident(field):
    """VmRSS (current) or VmHWM (highest) of this process, bytes."""
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(field)


def adapt(sources, target, check):
    """Adapt in this process; print time, traffic and memory as JSON."""
    from keras_t5gemma.conversion.adapt import adapt_to_folder

    Path("/proc/self/clear_refs").write_text("5")  # Reset the peak of the imports.
    base = resident("VmRSS")
    before, start = traffic(), time.perf_counter()
    adapt_to_folder(*sources, folder=target, check=check)
    seconds = time.perf_counter() - start
    read, wrote = (b - a for a, b in zip(before, traffic(), strict=True))
    peak = resident("VmHWM")
    keys = ("seconds", "read", "wrote", "base", "peak")
    print(json.dumps(dict(zip(keys, (seconds, read, wrote, base, peak), strict=True))))


def measure(name, sources, target, check, repeats):
    """Adapt in fresh processes; print a row of medians."""
    runs = []
    for _ in range(repeats):
        command = [sys.executable, __file__, "--sources", *map(str, sources)]
        command += ["--folder", str(target), *(["--check"] * check)]
        out = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        runs.append(json.loads(out.stdout.splitlines()[-1]))
        size = sum(f.stat().st_size for f in target.rglob("*.h5"))
        shutil.rmtree(target)
    median = {k: statistics.median(run[k] for run in runs) for k in runs[0]}
    files = [f for source in set(sources) for f in source.rglob("*.safetensors")]
    held = sum(f.stat().st_size for f in files)
    row = (
        held,
        size,
        median["read"],
        median["wrote"],
        median["base"],
        median["peak"] - median["base"],
    )
    numbers = " | ".join(f"{value / 1e9:.2f}" for value in row)
    checked = "yes" if check else "no"
    print(f"| {name} | {checked} | {median['seconds']:.1f} | {numbers} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pair", nargs=2, metavar=("ENCODER", "DECODER"))
    parser.add_argument("--sources", nargs="+", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.sources:
        adapt(args.sources, args.folder, args.check)
        return
    from keras_t5gemma.config import STACKS, StackConfig

    print(
        "| model | check | s | sources GB | result GB | read GB | written GB ", end=""
    )
    print("| base GB | peak - base GB |\n|" + "---|" * 9)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        target = Path(scratch, "result")
        if args.pair:
            sources = [Path(scratch, size) for size in args.pair]
            for size, source in dict(zip(args.pair, sources, strict=True)).items():
                make_folder(source, STACKS[size], 256_000)
            measure("-".join(args.pair), sources, target, True, 1)
            return
        for layers in LAYERS:
            source = Path(scratch, f"{layers}")
            stack = StackConfig(layers, 1024, 4096, 8, 4, 128)
            make_folder(source, stack, SMALL_VOCABULARY)
            for check in (False, True):
                name = f"{layers} layers"
                measure(name, [source], target, check, args.repeats)


if __name__ == "__main__":
    main()

"""Time and peak memory of loading an S-S checkpoint, against peers.

    python benchmarks/load.py [--folder F] [--repeats 3]
    python benchmarks/load.py --encoder torch [--folder F]
    python benchmarks/load.py --large torch jax [--folder F]

Makes a transformers folder of 312,517,632 random float32 weights (1.25 GB) on first
use, loads it in a fresh process per run, peers interleaved, and prints medians. Peak
memory is the highest resident size of the process, imports included; `base` is that
before loading. The file is in the page cache. `keras_t5gemma encoder` loads the encoder
only, with `encoder_only=True`: 46 % of the weights.

`--encoder BACKEND` loads the encoder only from each format (next to the folder) in
float32, bfloat16 and int8, and compares the memory above `base` with the weights kept.

`--large BACKEND ...` does so with all of 2B-2B, of random bfloat16 weights (11 GB), in
int8 and int4: loaded, and converted from file to file.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import resource
import shutil
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


def make_once(folder, make=make_folder):
    """Make the folder unless it exists."""
    if not (folder / "config.json").exists():
        # Elsewhere: Linux counts the memory of this process as the children's.
        process = multiprocessing.get_context("spawn").Process(
            target=make, args=(folder,)
        )
        process.start()
        process.join()


def make_large_folder(folder, shard_bytes=2 * 10**9):
    """Write random bfloat16 weights of 2B-2B's shapes, a shard in memory at a time."""
    import torch
    import transformers
    from safetensors.torch import save_file

    config = transformers.T5GemmaConfig(dtype="bfloat16")  # 2B-2B by default.
    with torch.device("meta"):
        model = transformers.T5GemmaForConditionalGeneration(config)
    config.save_pretrained(folder)
    block = 0.02 * torch.randn(2**24, generator=torch.Generator().manual_seed(0))
    block = block.to(torch.bfloat16)
    shards, size = [[]], 0
    for name, tensor in model.state_dict().items():
        if name.startswith("lm_head"):
            continue  # The decoder's table.
        if size + 2 * tensor.numel() > shard_bytes and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append((name, tensor.shape))
        size += 2 * tensor.numel()
    places = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name, shape in shard:
            repeats = -(-shape.numel() // len(block))
            values = block.repeat(repeats)[: shape.numel()]
            tensors[name] = values.reshape(shape).clone()
            places[name] = file
        save_file(tensors, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    text = json.dumps(index)
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def peak():
    """Highest resident size of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_formats(folder):
    """The checkpoint in the three formats, `{name: folder}`."""
    folders = {"transformers": folder}
    for name in ("keras_t5gemma", "keras_hub"):
        folders[name] = folder.with_name(f"{folder.name}_{name}")
        if not (folders[name] / "config.json").exists():
            code = (
                f"keras_t5gemma.convert({str(folder)!r}, {str(folders[name])!r})"
                if name == "keras_t5gemma"
                else f"keras_hub.models.T5GemmaBackbone.from_preset({str(folder)!r})"
                f".save_to_preset({str(folders[name])!r})"
            )
            command = [sys.executable, "-c", f"import {name}; {code}"]
            environment = {**os.environ, "KERAS_BACKEND": "torch"}
            subprocess.run(command, check=True, env=environment)
    return folders


def kept_bytes(model):
    """Bytes of the weights of a Keras model."""
    import ml_dtypes  # noqa: F401  NumPy knows bfloat16 then.
    import numpy as np

    return sum(math.prod(v.shape) * np.dtype(v.dtype).itemsize for v in model.weights)


def load(peer, folder, dtype):
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
            if part == ["convert"]:
                return keras_t5gemma.convert(folder, f"{folder}_{dtype}", dtype=dtype)
            only = part == ["encoder"]
            return keras_t5gemma.Backbone.from_preset(
                folder, encoder_only=only, dtype=dtype
            )

    base = peak()
    start = time.perf_counter()
    model = run()
    seconds = time.perf_counter() - start
    result = {"seconds": seconds, "base": base, "peak": peak()}
    if part == ["convert"]:
        written = Path(f"{folder}_{dtype}")
        result["kept"] = sum(f.stat().st_size for f in written.glob("*.h5"))
        shutil.rmtree(written)
    elif library == "keras_t5gemma":
        result["kept"] = kept_bytes(model)
    print(json.dumps(result))


def measure(peer, folder, dtype="float32"):
    """Load once in a fresh process; `None` if the peer fails, e.g. is not installed."""
    command = [sys.executable, __file__, "--peer", peer, "--folder", str(folder)]
    command += ["--dtype", dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        print(f"{peer}: {result.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(result.stdout.strip().splitlines()[-1])


def encoder_alone(backend, folder):
    """Print time and memory of loading the encoder from each format, one run each."""
    print("| format | dtype | seconds | kept, GB | peak - base, GB | / kept |")
    print("|---|---|---|---|---|---|")
    for name, path in make_formats(folder).items():
        for dtype in ("float32", "bfloat16", "int8"):
            result = measure(f"keras_t5gemma encoder {backend}", path, dtype)
            if result is None:
                continue
            kept, above = result["kept"], result["peak"] - result["base"]
            print(
                f"| {name} | {dtype} | {result['seconds']:.2f} | {kept / 1e9:.2f} | "
                f"{above / 1e9:.2f} | {above / kept:.2f} |"
            )


def large(backends, folder):
    """Print time and memory of quantizing 2B-2B, one run each."""
    print("| backend | dtype | | seconds | kept, GB | peak, GB | peak - base, GB |")
    print("|---|---|---|---|---|---|---|")
    for backend, dtype, what in itertools.product(
        backends, ("int8", "int4"), ("load", "convert")
    ):
        peer = "keras_t5gemma convert" if what == "convert" else "keras_t5gemma"
        result = measure(f"{peer} {backend}", folder, dtype)
        if result is not None:
            kept, top, base = (result[key] / 1e9 for key in ("kept", "peak", "base"))
            above = top - base
            print(
                f"| {backend} | {dtype} | {what} | {result['seconds']:.0f} | "
                f"{kept:.2f} | {top:.2f} | {above:.2f} ({above / kept:.2f} x) |",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="part of the peers' names")
    parser.add_argument("--encoder", metavar="BACKEND", help="the encoder alone")
    parser.add_argument("--large", metavar="BACKEND", nargs="+", help="2B-2B")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        load(args.peer, str(args.folder), args.dtype)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch) / "checkpoint"
        make_once(folder, make_large_folder if args.large else make_folder)
        if args.encoder:
            encoder_alone(args.encoder, folder)
            return
        if args.large:
            large(args.large, folder)
            return
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

"""Latency and memory of greedy generation, against peers and memory bandwidth.

    python benchmarks/generate.py [--folder F] [--plot FILE] [--json FILE]
    python benchmarks/generate.py --requests 200 [--peers P ...]
    python benchmarks/generate.py --device gpu

Makes an S-S folder of random float32 weights (1.25 GB) on first use. For every batch
size and encoder length, each peer loads it in a separate process and generates 1 and
N + 1 tokens for random sources without padding, in turn with the others, without stop
ids. Peers that do not fit into `--memory` together are measured in groups.

ms per token  median of (time of N + 1 tokens - time of 1) / N. Wall time; with
              `--threads 1`, which pins a core, CPU time, steadier on a busy machine.
x floor       relative to the time to read the decoder weights, the logit table (in the
              peer's precision) and the cached keys and values, at the best bandwidth
              measured between the runs.
first token   median time of 1 token, with a buffer of that length.
first call    wall time of N + 1 tokens right after loading, compilation included.
peak          highest resident size of the process, absolute and relative to the
              parameters in the peer's precision; `imports`: before loading (KerasHub
              imports TensorFlow if it is installed); `generating`: the highest after
              loading.

With `--requests`, a fresh process generates for sources of 4 to 400 tokens:
keras_t5gemma gets all of them in one call, the others batch by batch. With `--device
gpu` the model is 2B-2B with random bfloat16 weights, and the bandwidth that of copies.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from adapt import resident
from bandwidth import clock, copy_bandwidth, read_bandwidth
from load import make_folder
from peers import (
    BYTES,
    GPU_PEERS,
    LOADERS,
    OURS,
    PEERS,
    REQUEST_PEERS,
    convert,
    converted_folder,
    parse,
)

LOADING = {"keras_hub": 4.0}  # Peak memory of loading / weights; others 2.5.
SPAWN = multiprocessing.get_context("spawn")


def serve(connection, log, peer, batch, length, args):
    """Run a worker: load the peer, then measure once per message."""
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    library, mode, precision = parse(peer)
    os.environ.update(
        KERAS_BACKEND=mode.split()[0] if library.startswith("keras") else "torch",
        OMP_NUM_THREADS=str(args.threads),
        HF_HUB_OFFLINE="1",
        TORCHINDUCTOR_CACHE_DIR=tempfile.mkdtemp(dir=args.scratch),  # Empty.
        XLA_PYTHON_CLIENT_PREALLOCATE="false",
        TF_FORCE_GPU_ALLOW_GROWTH="true",
    )
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    lazy = {"transformers": "transformers.models.t5gemma.modeling_t5gemma"}
    importlib.import_module(lazy.get(library, library))
    result = {"imports": resident("VmHWM")}
    model, generate = LOADERS[library](mode, precision, batch, args)
    result["loading"] = resident("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")  # Reset the peak.

    def measure(ids, mask, new_tokens):
        start = clock(args.threads)
        tokens = np.asarray(generate(ids, mask, new_tokens))
        seconds = clock(args.threads) - start
        assert tokens.shape == (len(ids), new_tokens), tokens.shape
        return seconds

    start = time.perf_counter()
    if args.requests:
        answer_requests(library == OURS, measure, batch, args)
        result["seconds"] = time.perf_counter() - start
        programs = getattr(model, "compiled_programs", None)
        result["programs"] = programs() if callable(programs) else programs
        connection.send({**result, "generating": resident("VmHWM")})
        return
    ids = np.random.default_rng(0).integers(4, 256_000, (batch, length), "int32")
    source = (ids, np.ones_like(ids))
    measure(*source, args.new_tokens + 1)
    result["first_call"] = time.perf_counter() - start
    measure(*source, 1)
    connection.send(result)
    while connection.recv():
        run = {"long": measure(*source, args.new_tokens + 1)}
        run["short"] = measure(*source, 1)
        connection.send({**run, "generating": resident("VmHWM")})


def answer_requests(at_once, measure, batch, args):
    """Generate for sources of random length."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 401, args.requests)
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype("int32")
    ids = rng.integers(4, 256_000, mask.shape, "int32") * mask
    step = len(ids) if at_once else batch
    for start in range(0, len(ids), step):
        rows = slice(start, start + step)
        width = lengths[rows].max()
        measure(ids[rows, :width], mask[rows, :width], args.new_tokens)


class Worker:
    """A process that has loaded one peer and measures on request."""

    def __init__(self, peer, batch, length, args):
        print(f"{peer}: batch {batch}, encoder {length or '4-400'}", file=sys.stderr)
        self.peer, self.log = peer, Path(args.scratch, f"{peer} {batch} {length}.log")
        self.connection, remote = SPAWN.Pipe()
        self.process = SPAWN.Process(
            target=serve, args=(remote, self.log, peer, batch, length, args)
        )
        self.process.start()
        remote.close()

    def receive(self):
        """The next message, or `None` if it ended, with the cause on stderr."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            words = self.log.read_text(errors="replace").strip().splitlines()
            why = words[-1] if words else f"exit code {self.process.exitcode}"
            print(f"{self.peer}: failed: {why}", file=sys.stderr)

    def ask(self):
        self.connection.send(True)
        return self.receive()

    def stop(self):
        self.connection.send(False)
        self.process.join()

    def resident(self):
        """Its resident bytes now; files mapped by several processes are split."""
        rollup = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        return int(rollup.split("Pss:")[1].split()[0]) * 1024


def run_setting(peers, batch, length, parameters, args):
    """Every peer's results, and the highest bandwidth measured, bytes per second."""
    results, waiting, bandwidths = {}, list(peers), []
    while waiting:
        workers = {}
        while waiting:
            need = LOADING.get(parse(waiting[0])[0], 2.5) * parameters * 4
            held = sum(worker.resident() for worker in workers.values())
            if workers and held + need > args.memory * 1e9:
                break
            worker = Worker(waiting.pop(0), batch, length, args)
            if result := worker.receive():
                results[worker.peer] = {**result, "runs": []}
                workers[worker.peer] = worker
        for _ in range(args.repeats):
            if args.device == "cpu":
                bandwidths.append(read_bandwidth(args.threads))
            for peer, worker in list(workers.items()):
                if run := worker.ask():
                    results[peer]["runs"].append(run)
                else:
                    del workers[peer], results[peer]
        for worker in workers.values():
            worker.stop()
    if args.device == "gpu":
        bandwidths.append(alone(copy_bandwidth))
    common = {"batch": batch, "length": length, "bandwidth": max(bandwidths)}
    return {**common, "peers": results}


def alone(function, *args):
    """A function's result, computed in a separate process."""
    with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        return pool.submit(function, *args).result()


def count_numbers(folder):
    """Parameters, parameters read per token, values cached per token."""
    import keras_t5gemma as kt
    from keras_t5gemma.checkpoints.checkpoint import open_checkpoint

    pair = kt.T5GemmaConfig.pair("2b", "2b")
    config = open_checkpoint(folder).config if folder else pair
    decoder, parts = config.decoder, config.count_params_by_part()
    cached = 2 * decoder.num_layers * decoder.num_key_value_heads * decoder.head_dim
    read = parts["decoder embedding"] + parts["decoder blocks"]
    read += parts["cross-attention"] - cached * config.encoder.hidden_dim
    return config.count_params(), read, cached


def report(setting, numbers, args):
    """Add medians and ratios to the results of a setting and print them."""
    parameters, read, cached = numbers
    base = "bfloat16" if args.device == "gpu" else "float32"
    positions = setting["batch"] * (setting["length"] + args.new_tokens / 2)
    others = []
    for peer, result in setting["peers"].items():
        library, _, precision = parse(peer)
        size, runs = BYTES[precision], result["runs"]
        steps = [(run["long"] - run["short"]) / args.new_tokens for run in runs]
        needed = read * size + cached * positions * (4 if precision == "int8" else size)
        result["ms"] = 1000 * statistics.median(steps)
        result["floor"] = 1000 * needed / setting["bandwidth"]
        result["first_token"] = 1000 * statistics.median(run["short"] for run in runs)
        result["generating"] = max(run["generating"] for run in runs)
        result["peak"] = max(result["loading"], result["generating"])
        result["weights"] = parameters * size
        if library != OURS and precision == base:
            others.append(result["ms"])
    fastest = min(others, default=math.nan)
    print(
        f"\nBatch {setting['batch']}, encoder {setting['length']}, {args.new_tokens} "
        f"new tokens, {args.repeats} runs, {setting['bandwidth'] / 1e9:.1f} GB/s\n\n"
        f"| peer | ms per token | x floor | x fastest {base} peer | first token ms "
        "| first call s | peak GB | peak / weights | imports GB | generating GB |\n"
        + "|---" * 10
        + "|"
    )
    for peer, r in sorted(setting["peers"].items(), key=lambda item: item[1]["ms"]):
        print(
            f"| {peer} | {r['ms']:.1f} | {r['ms'] / r['floor']:.2f} "
            f"| {r['ms'] / fastest:.2f} | {r['first_token']:.0f} "
            f"| {r['first_call']:.1f} | {r['peak'] / 1e9:.2f} "
            f"| {r['peak'] / r['weights']:.2f} | {r['imports'] / 1e9:.2f} "
            f"| {r['generating'] / 1e9:.2f} |",
            flush=True,
        )


def plot(settings, file):
    """Bar chart of ms per token by peer and setting, with lines at the floor."""
    from matplotlib.figure import Figure

    peers = list(dict.fromkeys(peer for s in settings for peer in s["peers"]))
    axes = Figure(figsize=(8, 1 + 0.5 * len(peers))).subplots()
    height = 0.8 / len(settings)
    for i, setting in enumerate(settings):
        label = f"batch {setting['batch']}, encoder {setting['length']}"
        results = setting["peers"].values()
        places = np.array([peers.index(peer) for peer in setting["peers"]])
        places = places + (i + 0.5) * height - 0.4
        axes.barh(places, [r["ms"] for r in results], height, label=label)
        ends = (places - height / 2, places + height / 2)
        floor = "bandwidth floor" if setting is settings[-1] else None
        axes.vlines([r["floor"] for r in results], *ends, color="black", label=floor)
    axes.set_yticks(range(len(peers)), peers)
    axes.invert_yaxis()
    axes.set_xlabel("ms per token")
    axes.legend()
    axes.figure.savefig(file, bbox_inches="tight", dpi=100)


def run_requests(peers, args):
    """Print the seconds that each peer needs for the same requests."""
    results = {peer: [] for peer in peers}
    for _ in range(args.repeats):
        for peer in peers:
            worker = Worker(peer, args.batches[0], 0, args)
            if result := worker.receive():
                results[peer].append(result)
            worker.process.join()
    print(
        f"\n{args.requests} requests of 4 to 400 tokens, {args.new_tokens} new tokens, "
        f"batches of {args.batches[0]}, {args.repeats} runs\n\n"
        "| peer | s, compilation included | compiled programs | generating GB |\n"
        "|---|---|---|---|"
    )
    for peer, runs in results.items():
        if runs:
            seconds = statistics.median(run["seconds"] for run in runs)
            programs, top = runs[-1]["programs"], runs[-1]["generating"] / 1e9
            print(f"| {peer} | {seconds:.1f} | {programs or '-'} | {top:.2f} |")
    return results


def installed(peers):
    """The peers whose packages are installed; the others are named on stderr."""
    for peer in peers:
        library, mode, _ = parse(peer)
        backend = {"eager": "torch", "compiled": "torch"}.get(mode, mode.split(" ")[0])
        needed = [library, backend] if backend else [library]
        missing = [name for name in needed if not importlib.util.find_spec(name)]
        if missing:
            print(f"{peer}: {missing[0]} is not installed", file=sys.stderr)
        else:
            yield peer


def prepare(peers, folder):
    """Make the folders that the peers load, on first use."""
    if not (folder / "config.json").exists():
        alone(make_folder, folder)
    for library, _, precision in map(parse, peers):
        if library == "ctranslate2":
            if not (converted_folder(folder, precision) / "model.bin").exists():
                alone(convert, folder, precision)


def versions():
    packages = ("keras", "keras-hub", "jax", "tensorflow", "torch", "transformers")
    for package in (*packages, "ctranslate2"):
        if importlib.util.find_spec(package.replace("-", "_")):
            yield f"{package} {importlib.metadata.version(package)}"


def main():
    cores = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="S-S, in transformers' format")
    parser.add_argument("--batches", type=int, nargs="+", help="1 8; 1 8 64 on a GPU")
    parser.add_argument("--lengths", type=int, nargs="+", help="128 512; 512 on a GPU")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, help="5, or 1 with --requests")
    parser.add_argument("--peers", nargs="+", help=", ".join(PEERS))
    parser.add_argument("--threads", type=int, default=len(cores))
    parser.add_argument(
        "--memory", type=float, default=18, help="GB for all peers of a group"
    )
    parser.add_argument("--requests", type=int, default=0, help="number of sources")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--plot", type=Path, help="PNG or SVG file")
    parser.add_argument("--json", type=Path, help="file for all results")
    args = parser.parse_args()
    os.sched_setaffinity(0, cores[: args.threads])  # Inherited by the workers.
    gpu, requests = args.device == "gpu", args.requests
    args.batches = args.batches or ([8] if requests else [1, 8, 64] if gpu else [1, 8])
    args.lengths = args.lengths or ([512] if gpu else [128, 512])
    args.repeats = args.repeats or (1 if requests else 5)
    default = GPU_PEERS if gpu else REQUEST_PEERS if requests else PEERS
    peers = list(installed(args.peers or default))
    header = ", ".join([f"{args.threads} threads", *versions()])
    print(header, flush=True)
    results = []
    with tempfile.TemporaryDirectory() as args.scratch:
        args.folder = None if gpu else args.folder or Path(args.scratch, "s-s")
        if not gpu:
            prepare(peers, args.folder)
        if requests:
            results = run_requests(peers, args)
        else:
            numbers = alone(count_numbers, args.folder)
            for batch in args.batches:
                for length in args.lengths:
                    setting = run_setting(peers, batch, length, numbers[0], args)
                    report(setting, numbers, args)
                    results.append(setting)
    if args.json:
        args.json.write_text(json.dumps({"header": header, "results": results}))
    if args.plot and not requests:
        plot(results, args.plot)


if __name__ == "__main__":
    main()

"""Speculative decoding against plain greedy decoding.

    KERAS_BACKEND=... python benchmarks/speculate.py synopsis --data DIR [--rows N]
    KERAS_BACKEND=... python benchmarks/speculate.py passes [--preset NAME]

`synopsis`: the embedded preset on texts of DIR/synopsis/test.jsonl.gz (JSON objects
with `text`), one row a text; `--lines FILE` takes plain texts instead. CPU seconds of
the second of two runs, best of `--repeats`, with the tokens written a row and pass.
Fails if an answer differs.

`passes`: ms of a decoder pass over 1, 4 and 8 positions, of 1 and 8 rows, with 128
tokens of source; without `--preset` of the S-S shapes with random weights.

Times are CPU time of the process: run with one thread (OMP_NUM_THREADS=1, and
XLA_FLAGS=--xla_cpu_multi_thread_eigen=false on JAX).
"""

import argparse
import functools
import gzip
import json
import platform
import sys
import time
from pathlib import Path

import keras
import numpy as np
from keras import ops

import keras_t5gemma as kt
from keras_t5gemma.generation.options import GenerationOptions
from keras_t5gemma.generation.speculative import LENGTHS
from keras_t5gemma.generation.speculative_engine import SpeculativeEngine

PRESET = "t5gemma_mini_synopsis"


def read_texts(args):
    """The texts to summarize, or `None`, with the reason on stderr."""
    if args.lines:
        return args.lines.read_text(encoding="utf-8").splitlines()[: args.rows]
    file = args.data / "synopsis" / "test.jsonl.gz" if args.data else None
    if file is None or not file.exists():
        print(f"No texts: {file or 'pass --data or --lines'}.", file=sys.stderr)
        return None
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line)["text"] for line in lines]
    return rows[: args.rows]


def timed(function, repeats):
    """The last result, and the fewest CPU seconds after a first run."""
    function()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        result = function()
        seconds.append(time.process_time() - start)
    return result, min(seconds)


def compare(texts, args):
    """Print plain and speculative decoding for every precision and batch size."""
    print("| weights | batch | plain s | speculative s | x faster | tokens a pass |")
    print("|---|---|---|---|---|---|", flush=True)
    for precision in args.precisions:
        model = kt.Seq2SeqLM.from_preset(PRESET, dtype="float32")
        if precision != "float32":
            model.quantize(precision)
        for batch in args.batches:
            base = {"batch_size": batch}
            if args.max_length:
                base["max_length"] = args.max_length

            generate = functools.partial(model.generate, texts, **base)
            plain, slow = timed(generate, args.repeats)
            generate = functools.partial(generate, speculate="source")
            found, fast = timed(generate, args.repeats)
            different = sum(map(str.__ne__, plain, found))
            if different:
                raise SystemExit(f"{different} of {len(texts)} answers differ.")
            checked = GenerationOptions(speculate="source")
            engine = model._generator()._engine(checked).engine
            rate = engine.tokens_written / engine.row_passes
            print(
                f"| {precision} | {batch} | {slow:.2f} | {fast:.2f} "
                f"| {slow / fast:.2f} | {rate:.2f} |",
                flush=True,
            )


def make_backbone(preset, precision):
    """The backbone of a preset, or random weights of the S-S shapes."""
    if preset:
        backbone = kt.Backbone.from_preset(preset, dtype="float32")
    else:
        backbone = kt.Backbone(kt.T5GemmaConfig.pair("s", "s"))
    if precision != "float32":
        backbone.quantize(precision)
    return backbone


def measure_passes(args):
    """Print the time of a pass by rows and positions."""
    print("| weights | rows | positions | ms | x one position |")
    print("|---|---|---|---|---|", flush=True)
    for precision in args.precisions:
        backbone = make_backbone(args.preset, precision)
        engine = SpeculativeEngine(
            backbone, GenerationOptions(speculate="source").static_options()
        )
        for rows in args.batches:
            one = None
            for k in LENGTHS:
                seconds = pass_seconds(engine, rows, k, args)
                one = one or seconds
                print(
                    f"| {precision} | {rows} | {k + 1} | {1000 * seconds:.2f} "
                    f"| {seconds / one:.2f} |",
                    flush=True,
                )


def pass_seconds(engine, rows, k, args):
    """CPU seconds of a pass that proposes k tokens of a prompt, which are accepted."""
    length, count = 128, args.passes * (k + 1) + 2
    ids = np.random.default_rng(0).integers(4, 400, (rows, length)).astype("int32")
    options = GenerationOptions(speculate="source")
    inputs = {
        "encoder_token_ids": ids,
        "encoder_padding_mask": np.ones_like(ids),
        "decoder_token_ids": np.resize(ids, (rows, count)).astype("int32"),
        "prefix_token_ids": ids[:, :0],
        "prefix_count": np.int32(0),
        "prompt_lengths": np.full(rows, count, "int32"),
        "seeds": np.zeros(rows, "int32"),
        "max_length": np.int32(count),
        "traced_args": {**options.traced_args(), **options.token_lists(None, 8, count)},
    }
    seconds = []
    for _ in range(args.repeats + 1):
        state = engine.start(inputs)
        keras.ops.convert_to_numpy(state["index"])
        start = time.process_time()
        state = engine.advance(state, count, args.passes, k)
        assert int(ops.convert_to_numpy(state["index"])[0]) == count - 1
        seconds.append(time.process_time() - start)
    return min(seconds[1:]) / args.passes


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("synopsis", "passes"))
    parser.add_argument("--data", type=Path, help="folder with synopsis/test.jsonl.gz")
    parser.add_argument("--lines", type=Path, help="a file with a text in every line")
    parser.add_argument("--rows", type=int, default=64, help="number of texts")
    parser.add_argument("--max-length", type=int, help="of the answers, in tokens")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--precisions", nargs="+", default=["float32", "int8"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--passes", type=int, default=16, help="passes measured")
    parser.add_argument("--preset", help="for `passes`, instead of the S-S shapes")
    args = parser.parse_args()
    print(f"{keras.config.backend()}, Keras {keras.__version__}, {platform.machine()}")
    if args.what == "passes":
        measure_passes(args)
    elif texts := read_texts(args):
        compare(texts, args)


if __name__ == "__main__":
    main()

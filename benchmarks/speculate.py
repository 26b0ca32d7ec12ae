"""Speculative decoding against plain greedy decoding.

    KERAS_BACKEND=... python benchmarks/speculate.py texts --file FILE [--preset NAME]
    KERAS_BACKEND=... python benchmarks/speculate.py random [--no-repeat]
    KERAS_BACKEND=... python benchmarks/speculate.py passes [--preset NAME]

`texts`: a preset, by default the embedded one that shortens descriptions, on the texts
of FILE, JSON lines with `text` or `source`, also with .gz. benchmarks/correction.py
makes another preset and its texts. `random`: the S-S shapes with random weights on
random sources of 128 tokens, 64 new tokens, which soon repeat themselves; with
`--no-repeat` no token occurs twice in an answer.

Both print CPU seconds after a first run, best of `--repeats`, plain and speculative
decoding by turns, the tokens written a row and pass, and how many answers differ. In
float32 none may; int8 rounds activations, so that a difference of one rounding error
between passes of one and of several positions may grow and decide between two tokens.

`passes`: ms of a decoder pass by `--positions` and rows, with 128 tokens of source;
without `--preset` of the S-S shapes with random weights.

Times are CPU time of the process: run with one thread (OMP_NUM_THREADS=1, and
XLA_FLAGS=--xla_cpu_multi_thread_eigen=false on JAX).
"""

import argparse
import functools
import gzip
import json
import platform
import time
from pathlib import Path

import keras
import numpy as np
from keras import ops

import keras_t5gemma as kt
from keras_t5gemma.generation import speculative
from keras_t5gemma.generation.options import GenerationOptions
from keras_t5gemma.generation.speculative_engine import SpeculativeEngine

PRESET = "t5gemma_mini_synopsis"
SOURCE_LENGTH, NEW_TOKENS = 128, 64  # Of random weights.


def read_texts(file, rows):
    """The first texts of a file of JSON lines."""
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt") as lines:
        found = [json.loads(line) for line in lines][:rows]
    return [row["text"] if "text" in row else row["source"] for row in found]


def timed(functions, repeats):
    """The last result of each function, and its least CPU time after a first run."""
    results = [function() for function in functions]
    seconds = [[] for _ in functions]
    for _ in range(repeats):
        for i, function in enumerate(functions):
            start = time.process_time()
            results[i] = function()
            seconds[i].append(time.process_time() - start)
    return results, [min(times) for times in seconds]


def make_task(precision, args):
    """The model and its request, `(model, inputs, options)`."""
    if args.what == "random":
        model = kt.Seq2SeqLM(make_backbone(None, precision))
        shape = (args.rows, SOURCE_LENGTH)
        ids = np.random.default_rng(0).integers(4, 256_000, shape, "int32")
        inputs = {"encoder_token_ids": ids, "encoder_padding_mask": np.ones_like(ids)}
        return model, inputs, {"max_length": 1 + NEW_TOKENS, "stop_token_ids": None}
    model = kt.Seq2SeqLM.from_preset(args.preset or PRESET, dtype="float32")
    if precision != "float32":
        model.quantize(precision)
    return model, read_texts(args.file, args.rows), {"max_length": args.max_length}


def different(plain, found):
    """Number of answers that differ."""
    if isinstance(plain, dict):
        plain, found = plain["decoder_token_ids"], found["decoder_token_ids"]
        return int((plain != found).any(axis=1).sum())
    return sum(map(str.__ne__, plain, found))


def compare(args):
    """Print plain and speculative decoding for every precision and batch size."""
    head = "weights | batch | plain s | speculative s | x faster | tokens a pass"
    print(f"| {head} | different |\n|---|---|---|---|---|---|---|", flush=True)
    for precision in args.precisions:
        model, inputs, request = make_task(precision, args)
        options = {"no_repeat_ngram_size": 1} if args.no_repeat else {}
        for batch in args.batches:
            generate = functools.partial(
                model.generate, inputs, batch_size=batch, **request, **options
            )
            both = generate, functools.partial(generate, speculate="source")
            (plain, found), (slow, fast) = timed(both, args.repeats)
            count = different(plain, found)
            if count and precision == "float32":
                raise SystemExit(f"{count} of {args.rows} answers differ.")
            engines = model._generator().engines._engines.values()
            (engine,) = (e for e in engines if isinstance(e, SpeculativeEngine))
            rate = engine.tokens_written / engine.row_passes
            engine.tokens_written = engine.row_passes = 0
            print(
                f"| {precision} | {batch} | {slow:.2f} | {fast:.2f} "
                f"| {slow / fast:.2f} | {rate:.2f} | {count} |",
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
    speculative.LENGTHS = tuple(positions - 1 for positions in args.positions)
    print("| weights | rows | positions | ms | x first |")
    print("|---|---|---|---|---|", flush=True)
    for precision in args.precisions:
        backbone = make_backbone(args.preset, precision)
        engine = SpeculativeEngine(
            backbone, GenerationOptions(speculate="source").static_options()
        )
        for rows in args.batches:
            first = None
            for k in speculative.LENGTHS:
                seconds = pass_seconds(engine, rows, k, args)
                first = first or seconds
                print(
                    f"| {precision} | {rows} | {k + 1} | {1000 * seconds:.2f} "
                    f"| {seconds / first:.2f} |",
                    flush=True,
                )


def pass_seconds(engine, rows, k, args):
    """CPU seconds of a pass that proposes k tokens of a prompt, which are accepted."""
    length, count = SOURCE_LENGTH, args.passes * (k + 1) + 2
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
    parser.add_argument("what", choices=("texts", "random", "passes"))
    parser.add_argument("--file", type=Path, help="of texts, JSON lines")
    parser.add_argument("--preset", help="for `texts` and `passes`")
    parser.add_argument("--no-repeat", action="store_true", help="no token twice")
    parser.add_argument("--rows", type=int, default=32, help="number of sources")
    parser.add_argument("--max-length", type=int, help="of the answers, in tokens")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--positions", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--precisions", nargs="+", default=["float32", "int8"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--passes", type=int, default=16, help="passes measured")
    args = parser.parse_args()
    if args.what == "texts" and args.file is None:
        parser.error("`texts` needs --file.")
    print(f"{keras.config.backend()}, Keras {keras.__version__}, {platform.machine()}")
    measure_passes(args) if args.what == "passes" else compare(args)


if __name__ == "__main__":
    main()

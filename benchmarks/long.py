"""Time and peak memory of reading and of training on long sources.

    python benchmarks/long.py [--lengths 1024 4096 8192] [--plot benchmarks/long.png]

A case that takes more than `--timeout` seconds or `--gigabytes` is ended; longer ones
of its kind are not started.

One row, a model of width 256: 4 encoder and 2 decoder layers, 8 query and 4 key/value
heads of 64, window 4096, vocabulary 4,096. "read" encodes `length` tokens; "train" is a
step of SGD on `length` -> 128 tokens; "local" and "global" read with one kind of layer,
the local ones with a window of 256, for ours only. Each case is a process. "above
start" is the peak of resident memory from when the model is built, programs compiled on
the way; seconds are those of the fastest of `--calls` further calls. transformers and
KerasHub build the same model; KerasHub's encoder has no window.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGET = 128
SIZES = {"width": 256, "inner": 1024, "heads": 8, "kv_heads": 4, "head_dim": 64}
VOCABULARY, WINDOW = 4096, 4096
# Tasks of ours: "read" with layers of one kind, the local ones with a short window.
LAYERS = {"local": ("sliding_attention",), "global": ("full_attention",)}
SHORT_WINDOW = 256
KINDS = (
    "ours jax",
    "ours torch",
    "ours tensorflow",
    "transformers eager",
    "keras_hub jax",
)


def resident(field, process="self"):
    """VmRSS (current) or VmHWM (highest) of a process, bytes; 0 after its end."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((1024 * int(x.split()[1]) for x in lines if x.startswith(field)), 0)


def ids(length):
    import numpy as np

    return np.random.default_rng(0).integers(4, VOCABULARY, (1, length), "int32")


def make_ours(task, length, kernel):
    import keras
    import numpy as np

    import keras_t5gemma as kt

    window, kinds = WINDOW, None
    if task in LAYERS:
        window, kinds = SHORT_WINDOW, LAYERS[task]
    encoder, decoder = (
        kt.StackConfig(
            layers,
            *list(SIZES.values())[:2],
            *(8, 4, 64),
            sliding_window=window,
            layer_types=kinds and kinds * layers,
        )
        for layers in (4, 2)
    )
    backbone = kt.Backbone(kt.T5GemmaConfig(encoder, decoder, VOCABULARY))
    backbone.attention_kernel = kernel
    source = ids(length)
    if task != "train":
        return reader(backbone, source)
    model = kt.Seq2SeqLM(backbone)
    model.compile(optimizer=keras.optimizers.SGD(1e-3))
    target = ids(TARGET)
    x = {
        "encoder_token_ids": source,
        "encoder_padding_mask": np.ones_like(source),
        "decoder_token_ids": target,
        "decoder_padding_mask": np.ones_like(target),
    }
    weights = np.ones(target.shape, "float32")
    return lambda: list(map(float, model.train_on_batch(x, target, weights)))


def reader(backbone, source):
    """Weights are arguments of the compiled program, as in those of the package."""
    import keras

    def encode(ids):
        return backbone.encode(ids, keras.ops.ones_like(ids))

    if keras.config.backend() == "jax":
        import jax

        def with_weights(values, ids):
            state = list(zip(backbone.variables, values, strict=True))
            with keras.StatelessScope(state_mapping=state):
                return encode(ids)

        run, values = jax.jit(with_weights), [v.value for v in backbone.variables]
        return lambda: run(values, source).block_until_ready()
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        encode = tf.function(encode, autograph=False)
        return lambda: encode(source).numpy()
    import torch

    def call():
        with torch.inference_mode():
            encode(torch.from_numpy(source))

    return call


def make_transformers(task, length, _):
    import torch
    from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration
    from transformers.models.t5gemma import T5GemmaModuleConfig

    def stack(layers):
        return T5GemmaModuleConfig(
            vocab_size=VOCABULARY,
            hidden_size=SIZES["width"],
            intermediate_size=SIZES["inner"],
            num_hidden_layers=layers,
            num_attention_heads=SIZES["heads"],
            num_key_value_heads=SIZES["kv_heads"],
            head_dim=SIZES["head_dim"],
            query_pre_attn_scalar=SIZES["head_dim"],
            sliding_window=WINDOW,
            max_position_embeddings=2**16,
        )

    config = T5GemmaConfig(encoder=stack(4), decoder=stack(2), vocab_size=VOCABULARY)
    config._attn_implementation = "eager"
    model = T5GemmaForConditionalGeneration(config)
    source, target = (torch.from_numpy(ids(x)).long() for x in (length, TARGET))

    def read():
        with torch.inference_mode():
            model.get_encoder()(source)

    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def train():
        optimizer.zero_grad()
        model(input_ids=source, labels=target).loss.backward()
        optimizer.step()

    return read if task == "read" else train


def make_keras_hub(task, length, _):
    import keras
    import keras_hub
    import numpy as np

    sizes = {
        f"{side}_{name}": value
        for side, layers in (("encoder", 4), ("decoder", 2))
        for name, value in {
            "hidden_dim": 256,
            "intermediate_dim": 1024,
            "num_layers": layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        }.items()
    }
    backbone = keras_hub.models.T5GemmaBackbone(
        vocabulary_size=VOCABULARY,
        dropout_rate=0.0,
        rms_norm_eps=1e-6,
        query_pre_attn_scalar=64,
        attention_bias=False,
        hidden_activation="gelu_approximate",
        initializer_range=0.02,
        attention_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        rope_max_wavelength=10000.0,
        sliding_window=WINDOW,
        **sizes,
    )
    source, target = ids(length), ids(TARGET)
    x = {
        "encoder_token_ids": source,
        "encoder_padding_mask": np.ones_like(source),
        "decoder_token_ids": target,
        "decoder_padding_mask": np.ones_like(target),
    }
    if task == "read":
        x["decoder_token_ids"], x["decoder_padding_mask"] = target[:, :1], target[:, :1]
        return lambda: backbone.predict_on_batch(x)
    model = keras_hub.models.T5GemmaSeq2SeqLM(backbone=backbone)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    keras.Model.compile(model, optimizer=keras.optimizers.SGD(1e-3), loss=loss)
    # Read, since JAX may report an error with the value only.
    return lambda: list(map(float, keras.Model.train_on_batch(model, x, target)))


def measure(kind, task, length, calls, kernel):
    """Print seconds of a call and bytes above the start, as JSON."""
    makers = {"ours": make_ours, "transformers": make_transformers}
    run = makers.get(kind.split()[0], make_keras_hub)(task, length, kernel)
    Path("/proc/self/clear_refs").write_text("5")  # Reset the peak of the imports.
    start = resident("VmRSS")
    run()
    found = []
    for _ in range(calls):
        before = time.perf_counter()
        run()
        found.append(time.perf_counter() - before)
    print(
        json.dumps(
            {
                "seconds": min(found, default=float("nan")),
                "bytes": resident("VmHWM") - start,
            }
        )
    )


def case(kind, task, length, args):
    """The numbers of one process, or why there are none."""
    package, detail = kind.split()
    backend = detail if package != "transformers" else "torch"
    threads = {"OMP_NUM_THREADS": str(args.threads), "KERAS_BACKEND": backend}
    environment = {**os.environ, **threads, "TF_CPP_MIN_LOG_LEVEL": "3"}
    words = ["--worker", kind, task, str(length), "--calls", str(args.calls)]
    command = [sys.executable, __file__, *words, "--kernel", args.kernel]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as log:
        worker = subprocess.Popen(command, env=environment, stdout=out, stderr=log)
        why = wait(worker, args)
        texts = [(file.seek(0), file.read().decode())[1] for file in (out, log)]
    if why:
        return why
    try:
        return json.loads(texts[0].splitlines()[-1])
    except (IndexError, ValueError):
        lines = texts[1].strip().splitlines() or [""]
        return f"failed: {lines[-1][:80]}"


def wait(worker, args):
    """Wait for a process, or end it and say why."""
    end = time.perf_counter() + args.timeout
    why = None
    while worker.poll() is None and not why:
        time.sleep(0.05)
        if time.perf_counter() > end:
            why = f"over {args.timeout:.0f} s"
        elif resident("VmRSS", worker.pid) > 1e9 * args.gigabytes:
            why = f"over {args.gigabytes:.0f} GB"
    if why:
        worker.kill()
        worker.wait()
    return why


def plot(rows, path):
    """Seconds and memory against the length, logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 7), sharex=True)
    for column, task in enumerate(("read", "train")):
        for row, (key, scale, label) in enumerate(
            (("seconds", 1, "seconds"), ("bytes", 1e9, "GB above start"))
        ):
            axis = axes[row, column]
            for kind in KINDS:
                points = [
                    (length, found[key] / scale)
                    for (k, t, length), found in rows.items()
                    if k == kind and t == task and isinstance(found, dict)
                ]
                if points:
                    axis.loglog(*zip(*points, strict=True), "o-", label=kind)
            axis.set_ylabel(label)
            axis.set_title(task)
            axis.grid(True, alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("source tokens")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def print_slopes(rows, lengths):
    """From each length to the next: the exponent of the time, and memory a token."""
    print("\n| case | task | tokens | time ~ tokens to the | bytes a token |")
    print("|---|---|---|---|---|")
    for kind, task in dict.fromkeys(key[:2] for key in rows):
        for a, b in itertools.pairwise(lengths):
            low, high = (rows.get((kind, task, length)) for length in (a, b))
            if isinstance(low, dict) and isinstance(high, dict):
                power = math.log(high["seconds"] / low["seconds"], b / a)
                slope = (high["bytes"] - low["bytes"]) / (b - a)
                print(f"| {kind} | {task} | {a} to {b} | {power:.2f} | {slope:,.0f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--tasks", nargs="+", default=["read", "train"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calls", type=int, default=1)
    parser.add_argument("--kernel", default="auto", help="`attention_kernel` of ours")
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("--longest-training", type=int, default=2**20, help="tokens")
    parser.add_argument("--gigabytes", type=float, default=14, help="most of a case")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.worker:
        kind, task, length = args.worker
        measure(kind, task, int(length), args.calls, args.kernel)
        return
    rows = {}
    print("| case | task | tokens | seconds | GB above start |\n|---|---|---|---|---|")
    for task in args.tasks:
        longest = math.inf if task != "train" else args.longest_training
        for length in (length for length in args.lengths if length <= longest):
            for kind in args.kinds:
                before = [
                    rows[kind, task, other] for other in args.lengths if other < length
                ]
                ended = [why for why in before if isinstance(why, str)]
                found = ended[0] if ended else case(kind, task, length, args)
                rows[kind, task, length] = found
                words = f"{found} | "
                if isinstance(found, dict):
                    words = f"{found['seconds']:.2f} | {found['bytes'] / 1e9:.2f}"
                print(f"| {kind} | {task} | {length} | {words} |", flush=True)
    if len(args.lengths) > 1:
        print_slopes(rows, sorted(args.lengths))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()

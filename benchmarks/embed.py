"""Throughput of `TextEmbedder.embed`, and time of `hidden_states` of one text.

    KERAS_BACKEND=jax python benchmarks/embed.py [--texts 10000] [--length 256]
    KERAS_BACKEND=jax python benchmarks/embed.py --states
    KERAS_BACKEND=jax python benchmarks/embed.py --folder FOLDER

Texts of mixed length, made of words from the standard library's sources, with the
length distribution of package descriptions (mean about 60 words). The loop pads every
text to `--length` tokens and calls `predict` on the whole array.

`--states` compares `hidden_states` of one text, 100 times, with the bare encoder: the
same compiled encoder on token ids that are already arrays, of the same shape.

`--folder` compares mean-pooled vectors of ids by `TextEmbedder`, float32 and int8, with
transformers on a T5Gemma checkpoint in its format, all in one process.
"""

import argparse
import dataclasses
import re
import resource
import statistics
import time

import keras
import numpy as np

import keras_t5gemma as kt
from keras_t5gemma.config import STACKS
from keras_t5gemma.data.encoder_dataset import arrays
from keras_t5gemma.distribution.prediction import compiled


def make_texts(count):
    """Texts of 5 to 200 words from the sources of three standard modules."""
    import argparse as a
    import inspect
    import statistics as s
    import typing as t

    words = re.findall(
        r"[A-Za-z,.]+", " ".join(inspect.getsource(m) for m in (a, s, t))
    )
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(3.9, 0.65, count), 5, 200).astype(int)
    starts = rng.integers(0, len(words) - 200, count)
    pairs = zip(starts, lengths, strict=True)
    return [" ".join(words[start : start + n]) for start, n in pairs]


def compare_states(preprocessor, calls=100):
    """Print milliseconds of `hidden_states` and of the bare encoder, interleaved."""
    (text,) = make_texts(1)
    print(f"{keras.config.backend()}, one text, medians of {calls}")
    print("| encoder | tokens | first call, s | hidden_states, ms | bare, ms | ratio |")
    print("|---|---|---|---|---|---|")
    mini = kt.Backbone.from_preset("t5gemma_mini", encoder_only=True)
    config = dataclasses.replace(mini.config, encoder=STACKS["b"])
    for name, backbone in (("mini", mini), ("b", kt.Backbone(config))):
        model = kt.TextEmbedder(backbone, preprocessor)
        encoder = backbone.encoder
        bare = compiled(encoder, "bare", lambda i, p, e=encoder: e(i, p))
        for tokens in (16, 64, 256):
            rows = preprocessor.tokenizer.tokenize([" ".join([text] * 8)])
            short = preprocessor.tokenizer.detokenize(rows[0][:tokens])
            ids = arrays([rows[0][:tokens]], (1, tokens)).values()
            ids = [keras.ops.convert_to_tensor(x) for x in ids]
            runs = {
                "states": lambda m=model, s=short, n=tokens: m.hidden_states(
                    [s], pad_to=n
                )[0],
                "bare": lambda f=bare, x=ids: f(*x),
            }
            start = time.perf_counter()
            keras.ops.convert_to_numpy(runs["states"]())
            first = time.perf_counter() - start
            runs["bare"]()
            times = {key: [] for key in runs}
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for _ in range(calls):
                for key, run in runs.items():
                    start = time.perf_counter()
                    keras.ops.convert_to_numpy(run())
                    times[key].append(1e3 * (time.perf_counter() - start))
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            states, alone = (statistics.median(times[key]) for key in runs)
            print(
                f"| {name} | {tokens} | {first:.2f} | {states:.2f} | {alone:.2f} "
                f"| {states / alone:.2f} |  peak + {grown / 1e3:.1f} MB"
            )


def compare_with_transformers(folder, calls=5):
    """Print milliseconds of a batch of ids, and the least cosine to transformers."""
    import torch
    import transformers

    model = transformers.T5GemmaForConditionalGeneration.from_pretrained(folder)
    encoder = model.get_encoder().eval()

    def peer(ids, mask):
        ids, mask = torch.from_numpy(ids).long(), torch.from_numpy(mask)
        with torch.inference_mode():
            states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            total = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            return torch.nn.functional.normalize(total, dim=-1).numpy()

    def ours(dtype):
        embedder = kt.TextEmbedder.from_preset(folder, dtype=dtype, preprocessor=None)
        names = "encoder_token_ids", "encoder_padding_mask"
        return lambda *arrays: embedder.predict_on_batch(
            dict(zip(names, arrays, strict=True))
        )

    name = keras.config.backend()
    runs = {"transformers": peer}
    runs |= {f"{name} {dtype}": ours(dtype) for dtype in ("float32", "int8")}
    print("| rows, tokens | " + " | ".join(runs) + " | cosine float32, int8 |")
    print("|---|" + "---|" * (len(runs) + 1))
    size = model.config.encoder.vocab_size
    for shape in ((1, 16), (1, 128), (8, 128), (32, 128)):
        ids = np.random.default_rng(0).integers(4, size, shape).astype("int32")
        mask = np.ones(shape, "int32")
        vectors = {key: run(ids, mask) for key, run in runs.items()}  # Compiles.
        times = {key: [] for key in runs}
        for _ in range(calls):
            for key, run in runs.items():
                start = time.perf_counter()
                run(ids, mask)
                times[key].append(1e3 * (time.perf_counter() - start))
        least = {key: min(found) for key, found in times.items()}
        base = least["transformers"]
        cells = [f"{ms:.1f} ({ms / base:.2f})" for ms in least.values()]
        reference, *others = vectors.values()
        cosines = ", ".join(f"{(reference * v).sum(-1).min():.5f}" for v in others)
        print(f"| {shape} | " + " | ".join(cells) + f" | {cosines} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--length", type=int, default=256, help="tokens")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--states", action="store_true", help="time hidden_states")
    parser.add_argument("--folder", help="compare with transformers on this checkpoint")
    args = parser.parse_args()
    if args.folder:
        compare_with_transformers(args.folder)
        return
    texts = make_texts(args.texts)
    preprocessor = kt.Seq2SeqLMPreprocessor.from_preset(
        "t5gemma_mini", encoder_sequence_length=args.length
    )
    if args.states:
        compare_states(preprocessor)
        return
    model = kt.TextEmbedder.from_preset("t5gemma_mini", preprocessor=preprocessor)

    def sorted_by_length(texts):
        return model.embed(texts, batch_size=args.batch)

    def padded(texts):
        rows = [row[: args.length] for row in preprocessor.tokenizer.tokenize(texts)]
        x = arrays(rows, (len(rows), args.length))
        return keras.Model.predict(model, x, batch_size=args.batch, verbose=0)

    results = {}
    for name, run in (("embed", sorted_by_length), ("padded loop", padded)):
        run(texts)  # Compiles.
        start = time.perf_counter()
        vectors = run(texts)
        results[name] = time.perf_counter() - start, vectors
    difference = np.abs(results["embed"][1] - results["padded loop"][1]).max()
    print(f"{len(texts)} texts, {keras.config.backend()}, difference {difference:.1e}")
    for name, (seconds, _) in results.items():
        print(f"{name:>12}: {seconds:6.1f} s, {len(texts) / seconds:6.0f} texts/s")
    print(f"       ratio: {results['padded loop'][0] / results['embed'][0]:.2f}")


if __name__ == "__main__":
    main()

"""Throughput of `TextEmbedder.embed` against a fixed-length loop of the same model.

    KERAS_BACKEND=jax python benchmarks/embed.py [--texts 10000] [--length 256]

Texts of mixed length, made of words from the standard library's sources, with the
length distribution of package descriptions (mean about 60 words). The loop pads every
text to `--length` tokens and calls `predict` on the whole array.
"""

import argparse
import re
import time

import keras
import numpy as np

import keras_t5gemma as kt
from keras_t5gemma.data.encoder_dataset import arrays


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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--length", type=int, default=256, help="tokens")
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    texts = make_texts(args.texts)
    preprocessor = kt.Seq2SeqLMPreprocessor.from_preset(
        "t5gemma_mini", encoder_sequence_length=args.length
    )
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

"""Compiled programs of `generate`: how many short texts need, and what they cost.

    KERAS_BACKEND=jax python benchmarks/programs.py [--beams 4] [--texts 400]

Generates answers of the embedded preset to texts of 1 to 60 words, twice in one
process: the first time compiles the programs, the second one runs them. The aim is a
first time of at most 1.5 x the second one + 10 s.
"""

import argparse
import random
import time

import keras

import keras_t5gemma as kt

WORDS = (
    "a tool that reads and writes tables of numbers in the plain old kind of file for "
    "people who like the terminal more than any other program on this machine"
).split()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=400)
    parser.add_argument("--words", type=int, default=60)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    rng = random.Random(0)
    sizes = [rng.randint(1, args.words) for _ in range(args.texts)]
    texts = [" ".join(rng.choices(WORDS, k=size)) for size in sizes]
    model = kt.Seq2SeqLM.from_preset("t5gemma_mini_synopsis")
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        model.generate(texts, num_beams=args.beams, batch_size=args.batch)
        seconds.append(time.perf_counter() - start)
    first, second = seconds
    print("| backend | beams | texts | programs | s first | s second | s allowed |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print(
        f"| {keras.config.backend()} | {args.beams} | {args.texts} "
        f"| {model.compiled_programs()} | {first:.1f} | {second:.1f} "
        f"| {1.5 * second + 10:.1f} |"
    )


if __name__ == "__main__":
    main()

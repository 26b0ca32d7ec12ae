"""A model that corrects typos, for benchmarks/speculate.py: most of a text is copied.

    python benchmarks/correction.py DATA RUN [--max-steps N]

Reads English paragraphs of DATA/en-it.train.jsonl.gz and DATA/en-it.test.jsonl.gz (JSON
objects with `kind` and `en`), makes typos in 7 % of the words, and fine-tunes
`t5gemma_mini` to undo them. RUN gets train.jsonl and test.jsonl (`source` with typos,
`target` without) and the run directory `run`, whose `preset` is the model; an
interrupted run is resumed. Then prints, for test rows: exact matches, the character
error rate, and the shares of words with and without typos that are right in the answer.

The typos are the same in every run: each line seeds the generator of its typos.
"""

import argparse
import difflib
import gzip
import json
import random
import string
from pathlib import Path

import numpy as np

import keras_t5gemma as kt

TYPO_RATE = 0.07
WORDS = range(8, 49)  # In a paragraph, so that 128 tokens hold it.


def misspell(word, rng):
    """A word of at least two letters with one typo: swap, drop, double or replace."""
    places = [i for i, letter in enumerate(word) if letter.isalpha()]
    i = rng.choice(places)
    kind = rng.choice(("swap", "drop", "double", "replace"))
    if kind == "swap" and i + 1 < len(word):
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    if kind == "drop":
        return word[:i] + word[i + 1 :]
    if kind == "double":
        return word[:i] + word[i] + word[i:]
    return word[:i] + rng.choice(string.ascii_lowercase) + word[i + 1 :]


def add_typos(text, rate=TYPO_RATE, seed=0):
    """The text with a typo in a share of its words; the number of words stays."""
    rng = random.Random(f"{seed} {text}")
    words = text.split()
    for i, word in enumerate(words):
        if sum(map(str.isalpha, word)) >= 2 and rng.random() < rate:
            words[i] = misspell(word, rng)
    return " ".join(words)


def make_pairs(file):
    """Pairs of a file of translations, without repeated texts."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    texts = [" ".join(row["en"].split()) for row in rows if row["kind"] == "para"]
    texts = [text for text in dict.fromkeys(texts) if len(text.split()) in WORDS]
    return [{"source": add_typos(text), "target": text} for text in texts]


def edit_distance(a, b):
    """Number of characters to insert, delete or replace."""
    b = np.array([ord(c) for c in b], "int64")
    places = np.arange(len(b) + 1)
    row = places
    for i, character in enumerate(a, 1):
        new = np.concatenate(
            [[i], np.minimum(row[:-1] + (b != ord(character)), row[1:] + 1)]
        )
        # An insertion takes the least of all cells to the left, each one further.
        row = np.minimum.accumulate(new - places) + places
    return int(row[-1])


def score(sources, answers, targets):
    """Scores in percent of corrected texts, `{name: number}`."""
    right = {True: [], False: []}
    for source, answer, target in zip(sources, answers, targets, strict=True):
        words = target.split()
        matcher = difflib.SequenceMatcher(None, answer.split(), words, autojunk=False)
        found = np.zeros(len(words), bool)
        for block in matcher.get_matching_blocks():
            found[block.b : block.b + block.size] = True
        for is_right, word, given in zip(found, words, source.split(), strict=True):
            right[word != given].append(is_right)
    exact = kt.score_texts(answers, targets, "exact_match")["exact_match"]
    errors = sum(map(edit_distance, answers, targets))
    return {
        "exact match": exact["mean"],
        "its standard error": exact["standard_error"],
        "character error rate": 100 * errors / sum(map(len, targets)),
        "words with a typo that are right": 100 * np.mean(right[True]),
        "words without a typo that are right": 100 * np.mean(right[False]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="folder with en-it.*.jsonl.gz")
    parser.add_argument("run", type=Path, help="folder that is written")
    parser.add_argument("--max-steps", type=int, help="of 32 rows; default: an epoch")
    parser.add_argument(
        "--rows", type=int, default=200, help="test rows that are scored"
    )
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        pairs = make_pairs(args.data / f"en-it.{split}.jsonl.gz")
        with (args.run / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(pair) + "\n" for pair in pairs)
        print(f"{split}: {len(pairs)} pairs", flush=True)
    kt.finetune(
        "t5gemma_mini",
        args.run / "train.jsonl",
        args.run / "run",
        encoder_sequence_length=128,
        decoder_sequence_length=128,
        epochs=1,
        max_steps=args.max_steps,
        optimizer="adamw",
        learning_rate=1e-3,
        schedule="cosine",
        warmup_steps=100,
        save_freq=100,
    )
    rows = pairs[: args.rows]  # Of the test file, the last one.
    sources, targets = ([row[name] for row in rows] for name in ("source", "target"))
    model = kt.Seq2SeqLM.from_preset(args.run / "run" / "preset", dtype="float32")
    untouched = score(sources, sources, targets)
    corrected = score(sources, model.generate(sources), targets)
    print(f"\n| {len(rows)} test rows | with typos | corrected |\n|---|---|---|")
    for name, number in corrected.items():
        print(f"| {name}, % | {untouched[name]:.2f} | {number:.2f} |")


if __name__ == "__main__":
    main()

r"""Train a text classifier from a CSV file, measure it, save it, use it.

The classes are the values of a column:

    python examples/train_classifier.py examples/data/packages.csv \
        --text description --label section --output classifier
    python examples/train_classifier.py --classify "A game of cards" --output classifier
"""

import argparse
import collections
import csv
import random
from pathlib import Path

import keras

import keras_t5gemma


def read_rows(path: Path, text: str, label: str) -> list[tuple[str, str]]:
    """`(text, label)` of the rows of a CSV file; rows without either are left out."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    for column in (text, label):
        if not rows or column not in rows[0]:
            known = list(rows[0]) if rows else []
            raise SystemExit(f"{path} has no column {column!r}; it has {known}.")
    return [(row[text], row[label]) for row in rows if row[text] and row[label]]


def split(rows: list[tuple[str, str]], share: float, seed: int = 0) -> tuple:
    """`(train, test)` with the same share of every label in `test`."""
    by_label = collections.defaultdict(list)
    for row in rows:
        by_label[row[1]].append(row)
    train, test = [], []
    for group in by_label.values():
        random.Random(seed).shuffle(group)
        count = round(share * len(group))
        test += group[:count]
        train += group[count:]
    return train, test


def train(
    rows: list[tuple[str, str]],
    preset: str = "t5gemma_mini",
    epochs: int = 12,
    learning_rate: float = 5e-4,
) -> keras_t5gemma.TextClassifier:
    """A classifier of the labels in the rows; only the encoder is read and trained."""
    keras.utils.set_random_seed(0)
    texts, labels = zip(*rows, strict=True)
    model = keras_t5gemma.TextClassifier.from_preset(
        preset, class_names=sorted(set(labels)), pooling="mean"
    )
    model.compile(keras.optimizers.AdamW(learning_rate))
    model.fit(list(texts), list(labels), epochs=epochs, batch_size=8, verbose=2)
    return model


def report(model: keras_t5gemma.TextClassifier, rows: list[tuple[str, str]]) -> float:
    """Print the accuracy and the errors on rows; return the accuracy."""
    texts, labels = zip(*rows, strict=True)
    found = model.classify(list(texts))
    for text, right, answer in zip(texts, labels, found, strict=True):
        if right != answer:
            print(f"  {right}, not {answer}: {text:.60}")
    accuracy = sum(map(str.__eq__, labels, found)) / len(labels)
    print(f"accuracy on {len(rows)} rows that were not trained on: {accuracy:.0%}")
    return accuracy


def main(arguments: list[str] | None = None) -> None:
    """Train and save, or classify one text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--text", default="text", help="column of the texts")
    parser.add_argument("--label", default="label", help="column of the classes")
    parser.add_argument("--preset", default="t5gemma_mini")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--output", type=Path, default=Path("classifier"))
    parser.add_argument("--classify", metavar="TEXT")
    options = parser.parse_args(arguments)
    if options.classify is not None:
        model = keras_t5gemma.TextClassifier.from_preset(options.output)
        print(*model.classify([options.classify]))
        return
    if options.file is None:
        parser.error("pass a CSV file, or --classify TEXT.")
    rows = read_rows(options.file, options.text, options.label)
    seen, unseen = split(rows, share=0.2)
    model = train(seen, options.preset, options.epochs)
    report(model, unseen)
    model.save_to_preset(options.output)
    print(f"saved in {options.output}")


if __name__ == "__main__":
    main()

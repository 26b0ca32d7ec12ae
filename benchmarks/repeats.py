"""Repeated words and ROUGE-L by `no_repeat_ngram_size` and `repetition_penalty`.

    KERAS_BACKEND=torch python benchmarks/repeats.py --data DATA [--rows 600]

On validation rows of the synopsis data; the embedded preset's generation_config.json
has the setting that was chosen by it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import mini_cards  # noqa: E402

SETTINGS = [(0, 1.0), (3, 1.0), (2, 1.0), (2, 1.2), (2, 1.5), (2, 2.0)]


def again(answer):
    """Whether a word of four letters or more occurs twice."""
    long = [word for word in mini_cards.words(answer) if len(word) > 3]
    return len(set(long)) < len(long)


def main():
    """Print the table, a row as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--preset", default="t5gemma_mini_synopsis")
    parser.add_argument("--rows", type=int, default=600)
    args = parser.parse_args()
    mini_cards.SHARES["long word twice, %"] = again
    shown = ["rougeL", "word twice in a row, %", "long word twice, %"]
    shown.append("words not in the source, %")
    print(f"greedy / 5 beams, {args.rows} validation rows\n")
    print(f"| n-gram | penalty | {' | '.join(shown)} |\n|---|---|---|---|---|---|")
    for size, penalty in SETTINGS:
        options = {"no_repeat_ngram_size": size, "repetition_penalty": penalty}
        scores, _ = mini_cards.measure(
            args.preset, args.data, "valid", args.rows, **options
        )
        cells = [
            " / ".join(f"{measured[name]['mean']:.1f}" for measured in scores.values())
            for name in shown
        ]
        print(f"| {size} | {penalty} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

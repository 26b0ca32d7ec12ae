"""Write the encoder evaluation tasks in the form that `keras-t5gemma evaluate` reads.

    python experiments/encoder_tasks.py --data DATA --output TASKS
    keras-t5gemma evaluate --tasks supersense section synopsis --data TASKS ...

`DATA` holds `supersense/*.jsonl.gz` (text, label) and `synopsis/*.jsonl.gz` (text,
summary, section), each split into train, valid and test. Tasks:

- supersense: the class of a WordNet gloss among the lexicographer files.
- section: the Debian section of a package from its description.
- synopsis: the description of a package, searched for by its one-line synopsis.
- belongs, sense, wic: pairs of texts, see text_pairs.py; these also read
  `text/docs.txt.gz`.
"""

import argparse
import collections
import gzip
import json
from pathlib import Path

import text_pairs

SPLITS = text_pairs.SPLITS
# task: (folder of DATA, {field that `evaluate` reads: field of DATA})
TASKS = {
    "supersense": ("supersense", {"text": "text", "label": "label"}),
    "section": (
        "synopsis",
        {"text": "text", "label": "section", "group": "source"},
    ),
    "synopsis": ("synopsis", {"query": "summary", "document": "text"}),
}
# Classes with fewer training rows are left out.
MIN_CLASS_ROWS = {"section": 150}


def write_tasks(data, output):
    """Write `output/TASK/{train,valid,test}.jsonl.gz` for every task.

    Raises:
        FileNotFoundError: naming the missing file of `data`.
    """
    for task, (folder, fields) in TASKS.items():
        splits = {}
        for split in SPLITS:
            path = Path(data) / folder / f"{split}.jsonl.gz"
            with gzip.open(path, "rt", encoding="utf-8") as file:
                rows = map(json.loads, file)
                splits[split] = [
                    {new: row[old] for new, old in fields.items()} for row in rows
                ]
        if task in MIN_CLASS_ROWS:
            counts = collections.Counter(row["label"] for row in splits["train"])
            kept = {c for c, count in counts.items() if count >= MIN_CLASS_ROWS[task]}
            splits = {
                split: [row for row in rows if row["label"] in kept]
                for split, rows in splits.items()
            }
        for split, rows in splits.items():
            path = Path(output) / task / f"{split}.jsonl.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            with gzip.open(path, "wt", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    write_tasks(args.data, args.output)
    text_pairs.write_pairs(args.data, args.output)


if __name__ == "__main__":
    main()

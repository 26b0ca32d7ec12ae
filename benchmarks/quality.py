"""Quality and speed of quantized weights: the embedded preset on the synopsis test.

    python benchmarks/quality.py --data DATA/synopsis/test.jsonl.gz [--rows 1780]

ROUGE F1 x 100 with stemmer and BLEU, with standard errors, and seconds for float32,
bfloat16, int8 and int4, greedy and with beams. Rows are JSON objects with `text` and
`summary`.
"""

import argparse
import gzip
import json
import time
from pathlib import Path

import keras_t5gemma as kt

PRESET = "t5gemma_mini_synopsis"


def make_model(precision):
    """Load the preset in a precision."""
    if precision == "bfloat16":
        return kt.Seq2SeqLM.from_preset(PRESET, dtype=precision)
    model = kt.Seq2SeqLM.from_preset(PRESET)
    if precision != "float32":
        model.quantize(precision)
    return model


def score(answers, rows):
    """ROUGE-1, ROUGE-L and BLEU of answers, with standard errors, as strings."""
    found = kt.score_texts(answers, [row["summary"] for row in rows], ["rouge", "bleu"])
    scores = [found[name] for name in ("rouge1", "rougeL", "bleu")]
    return [f"{s['mean']:.1f} ± {s['standard_error']:.1f}" for s in scores]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a .jsonl.gz file")
    parser.add_argument("--rows", type=int, help="number of rows; default: all")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 5])
    parser.add_argument(
        "--precisions", nargs="+", default=["float32", "bfloat16", "int8", "int4"]
    )
    args = parser.parse_args()
    with gzip.open(args.data, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][: args.rows]
    print(f"{len(rows)} rows\n")
    print("| weights | beams | ROUGE-1 | ROUGE-L | BLEU | same answer | s |")
    print("|---|---|---|---|---|---|---|")
    exact = {}
    for precision in args.precisions:
        model = make_model(precision)
        for beams in args.beams:
            start = time.perf_counter()
            texts = [row["text"] for row in rows]
            answers = model.generate(texts, num_beams=beams, strip_prompt=True)
            seconds = time.perf_counter() - start
            reference = exact.setdefault(beams, answers)
            same = sum(map(str.__eq__, answers, reference)) / len(rows)
            numbers = " | ".join(score(answers, rows))
            print(
                f"| {precision} | {beams} | {numbers} | {same:.0%} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

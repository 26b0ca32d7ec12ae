"""Train the embedded presets' tokenizer: BPE, 8,192 pieces, Gemma's special ids.

    python tools/train_tokenizer.py --data DATA --output vocabulary.spm

`DATA` holds `synopsis/train.jsonl.gz` and `text/docs.txt.gz`.
"""

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
import sentencepiece

PIECES, LINES_OF_DOCUMENTATION = 8192, 60_000


def read_lines(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [line.rstrip("\n") for line in file]


def train_tokenizer(data, path):
    rows = [json.loads(line) for line in read_lines(data / "synopsis/train.jsonl.gz")]
    lines = [line for row in rows for line in row["text"].split("\n") if line]
    lines += [row["summary"] for row in rows]
    documentation = read_lines(data / "text/docs.txt.gz")
    np.random.default_rng(0).shuffle(documentation)
    lines += documentation[:LINES_OF_DOCUMENTATION]
    controls = ["<mask>", "<2mass>", "[@BOS@]"]
    controls += [f"<unused{i}>" for i in range(99)]
    controls += ["<start_of_turn>", "<end_of_turn>"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line[:2000] for line in lines]),
        model_prefix=str(path.with_suffix("")),
        vocab_size=PIECES,
        model_type="bpe",
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        control_symbols=controls,
        user_defined_symbols=["\n", "\n\n"],
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        character_coverage=0.9995,
        max_sentence_length=8000,
        minloglevel=2,
    )
    path.with_suffix(".model").replace(path)
    path.with_suffix(".vocab").unlink()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("vocabulary.spm"))
    args = parser.parse_args()
    train_tokenizer(args.data, args.output)

"""The texts of the experiments, as documents and as token ids."""

import gzip
import json
import random
import zlib
from pathlib import Path

import numpy as np

import keras_t5gemma as kt
from keras_t5gemma.utils.ragged import Ragged

WORDS_A_DOCUMENT = 100
HELD_OUT = 100  # One document in so many.


def read_documents(data):
    """Training and held-out documents, `({"docs", "descriptions"}, the same)`.

    The files hold a paragraph a line and no ends of documents; what follows each other
    mostly belongs together. Which documents are held out is decided by their text.
    """
    train, held_out = {}, {}
    for name in ("docs", "descriptions"):
        path = Path(data) / f"text/{name}.txt.gz"
        with gzip.open(path, "rt", encoding="utf-8") as file:
            documents = list(_together(line.rstrip("\n") for line in file))
        chosen = [zlib.crc32(d.encode()) % HELD_OUT == 0 for d in documents]
        pairs = list(zip(documents, chosen, strict=True))
        train[name] = [d for d, held in pairs if not held]
        held_out[name] = [d for d, held in pairs if held]
    return train, held_out


def _together(lines):
    document, words = [], 0
    for line in lines:
        document.append(line)
        words += len(line.split())
        if words >= WORDS_A_DOCUMENT:
            yield "\n".join(document)
            document, words = [], 0
    if document:
        yield "\n".join(document)


def for_sources(data, seed=0):
    """Documents that the decoder-only models are trained on, in the order they are.

    All descriptions, and of the documentation as many characters.
    """
    train, _ = read_documents(data)
    rng = np.random.default_rng(seed)
    docs = [train["docs"][i] for i in rng.permutation(len(train["docs"]))]
    ends = np.cumsum([len(d) for d in docs])
    docs = docs[: np.searchsorted(ends, sum(map(len, train["descriptions"])))]
    documents = train["descriptions"] + docs
    return [documents[i] for i in rng.permutation(len(documents))]


def mixture(data, once, twice, longest=250):
    """Texts to pretrain pairs on: documents, and short paragraphs that say it twice.

    `once` and `twice` are their numbers, `longest` the characters of a paragraph.

    Where a text says everything twice, the half that is read is the half that is to be
    written: a small model learns last to copy from what its encoder has read.
    """
    rng = random.Random(0)
    train, _ = read_documents(data)
    texts = rng.sample(train["descriptions"] + train["docs"], once)
    texts += rng.sample(doubled(train["descriptions"], longest), twice)
    rng.shuffle(texts)
    return texts


def held_out(data, documents=400):
    """So many held-out documents, half of each kind."""
    _, held = read_documents(data)
    return [d for part in held.values() for d in part[: documents // 2]]


def doubled(documents, longest=250):
    """Paragraphs of 40 to `longest` characters of documents, each of them twice."""
    lines = [line for text in documents for line in text.split("\n")]
    return [f"{line}\n{line}" for line in lines if 40 <= len(line) <= longest]


def read_synopsis(data, split):
    """Text pairs of a split, `{"encoder_text": [...], "decoder_text": [...]}`."""
    path = Path(data) / f"synopsis/{split}.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return {
        "encoder_text": [row["text"] for row in rows],
        "decoder_text": [row["summary"] for row in rows],
    }


def tokenizer():
    """That of the embedded preset, 8,192 pieces."""
    return kt.Tokenizer.from_preset("t5gemma_mini_synopsis")


def chunks(documents, length):
    """Decoder-only rows, int32 `(rows, length + 1)`: bos, text, eos, bos, ..."""
    pieces = tokenizer()
    rows = Ragged.from_rows(pieces.tokenize(documents))
    ids = np.insert(rows.values, rows.ends, pieces.end_token_id)
    starts = rows.starts + np.arange(len(rows))
    ids = np.insert(ids, starts, pieces.start_token_id).astype("int32")
    count = (len(ids) - 1) // length
    return np.stack([ids[i * length : (i + 1) * length + 1] for i in range(count)])

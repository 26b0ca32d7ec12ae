"""Texts of the experiments as documents and as token ids."""

import gzip
import json
import random
import zlib
from pathlib import Path

import numpy as np

import keras_t5gemma as kt
from keras_t5gemma.utils.ragged import Ragged

WORDS_A_DOCUMENT = 100
HELD_OUT = 100  # One document in a hundred is held out.


def read_documents(data):
    """Training and held-out documents, each `{"docs": [...], "descriptions": [...]}`.

    The files have one paragraph per line and no document boundaries; neighboring lines
    mostly belong together. A hash of the text decides which documents are held out.
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


def for_sources(data, seed=0, everything=False):
    """Documents to train decoder-only models on, in training order.

    All descriptions, and documentation of the same number of characters, or all
    documentation if `everything`.
    """
    train, _ = read_documents(data)
    rng = np.random.default_rng(seed)
    docs = [train["docs"][i] for i in rng.permutation(len(train["docs"]))]
    if not everything:
        ends = np.cumsum([len(d) for d in docs])
        docs = docs[: np.searchsorted(ends, sum(map(len, train["descriptions"])))]
    documents = train["descriptions"] + docs
    return [documents[i] for i in rng.permutation(len(documents))]


def mixture(data, once, twice, longest=250):
    """Pretraining texts: documents, and short paragraphs that are repeated once.

    In a repeated paragraph the encoder's half equals the target. Small models learn to
    copy from the encoder last, and hardly without such texts.

    Args:
        data: folder of the texts.
        once: number of documents.
        twice: number of repeated paragraphs.
        longest: maximum characters of a paragraph.
    """
    rng = random.Random(0)
    train, _ = read_documents(data)
    texts = rng.sample(train["descriptions"] + train["docs"], once)
    texts += rng.sample(doubled(train["descriptions"], longest), twice)
    rng.shuffle(texts)
    return texts


def held_out(data, documents=400):
    """Held-out documents, half of each kind."""
    _, held = read_documents(data)
    return [d for part in held.values() for d in part[: documents // 2]]


def doubled(documents, longest=250):
    """Paragraphs of 40 to `longest` characters, each repeated once."""
    lines = [line for text in documents for line in text.split("\n")]
    return [f"{line}\n{line}" for line in lines if 40 <= len(line) <= longest]


def read_synopsis(data, split, names=False):
    """Text pairs of a split, `{"encoder_text": [...], "decoder_text": [...]}`.

    With `names` also the packages' names, `"name"`.
    """
    path = Path(data) / f"synopsis/{split}.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    pairs = {
        "encoder_text": [row["text"] for row in rows],
        "decoder_text": [row["summary"] for row in rows],
    }
    return {**pairs, "name": [row["id"] for row in rows]} if names else pairs


def tokenizer():
    """The embedded preset's tokenizer, 8,192 pieces."""
    return kt.Tokenizer.from_preset("t5gemma_mini_synopsis")


def chunks(documents, length):
    """Packed decoder-only rows, int32 `(rows, length + 1)`: bos, text, eos, bos, ..."""
    pieces = tokenizer()
    rows = Ragged.from_rows(pieces.tokenize(documents))
    ids = np.insert(rows.values, rows.ends, pieces.end_token_id)
    starts = rows.starts + np.arange(len(rows))
    ids = np.insert(ids, starts, pieces.start_token_id).astype("int32")
    count = (len(ids) - 1) // length
    return np.stack([ids[i * length : (i + 1) * length + 1] for i in range(count)])

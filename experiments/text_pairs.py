"""Classification of pairs of texts, with negatives that words alone do not reveal.

- belongs: does a one-line synopsis belong to a package description?
- sense: does an example sentence use its word in the sense of a WordNet gloss?
- wic: do two WordNet example sentences use a word in the same sense? Built as the
  word-in-context task (arXiv 1808.09121) from WordNet's own examples.

In belongs and sense every text occurs in the same number of positive and negative
pairs, so that neither text alone says anything about the label. Rows have `text`,
`text_pair`, `label` and `group`; rows of a group share texts and a split.
"""

import collections
import gzip
import hashlib
import json
import random
import re
from pathlib import Path

import numpy as np

SPLITS = ("train", "valid", "test")
BLOCK = 1_272  # Packages that partners are searched among: the size of the test split.
HARDEST = 2 / 3  # Share of pairs of packages that is kept.
MIN_WORDS = 3  # Of an example sentence.
# Shares of the words for validation and test, in thousandths.
VALID, TEST = 100, 250
PAIRS_A_WORD = 4  # Of wic.


def crossed(texts, partners, group):
    """Rows of two matching pairs: both as they are, and both with partners swapped."""
    return [
        {
            "text": partners[j],
            "text_pair": texts[i],
            "label": "yes" if i == j else "no",
            "group": group,
        }
        for i in (0, 1)
        for j in (0, 1)
    ]


def belongs(rows, vectorizer):
    """Synopsis and description of a package, one package of each source.

    Two packages of different sources form a group: each description with its synopsis,
    and with the synopsis of the other. Partners are chosen so that the TF-IDF
    similarity of a description to the other synopsis is near that to its synopsis.

    Args:
        rows: dicts with `source`, `text` and `summary`.
        vectorizer: a fitted `TfidfVectorizer`.
    """
    first = {}
    for row in rows:
        first.setdefault(row["source"], row)
    packages = list(first.values())
    random.Random(0).shuffle(packages)
    made = []
    for start in range(0, len(packages), BLOCK):
        block = packages[start : start + BLOCK]
        for i, j in _partners(block, vectorizer):
            texts = [block[k]["text"] for k in (i, j)]
            synopses = [block[k]["summary"] for k in (i, j)]
            made += crossed(texts, synopses, block[i]["source"])
    return made


def _partners(block, vectorizer):
    """Disjoint pairs of packages, those that words confuse most."""
    texts = vectorizer.transform([row["text"] for row in block])
    synopses = vectorizer.transform([row["summary"] for row in block])
    similarity = (texts @ synopses.T).toarray()
    gaps = np.abs(similarity.diagonal()[:, None] - similarity)
    # Among equal gaps prefer packages about the same.
    costs = gaps + gaps.T - 0.3 * (texts @ texts.T).toarray()
    same = [" ".join(row["summary"].lower().split()) for row in block]
    free, found = np.ones(len(block), bool), []
    for flat in np.argsort(costs, axis=None):
        i, j = divmod(int(flat), len(block))
        if free[i] and free[j] and same[i] != same[j]:
            free[[i, j]] = False
            found.append((i, j))
    found.sort(key=lambda pair: gaps[pair] + gaps.T[pair])
    return found[: round(HARDEST * len(found))]


def read_senses(lines, labels):
    """WordNet senses with examples of the word.

    Args:
        lines: `lemmas: gloss. example. example`, among other documentation.
        labels: `{gloss: supersense}`; other lines are left out.

    Returns:
        `{(lemma, part of speech): {gloss: examples}}`. A gloss and its examples occur
        once, under the lemma that most of the examples contain.
    """
    senses, seen = collections.defaultdict(dict), set()
    for line in lines:
        lemmas, _, body = line.rstrip("\n").partition(": ")
        gloss, *examples = body.rstrip(".").split(". ")
        if gloss not in labels or gloss in seen:
            continue
        seen.add(gloss)
        examples = [
            e for e in examples if len(e.split()) >= MIN_WORDS and e not in seen
        ]
        seen.update(examples)
        found = {
            lemma: list(filter(_inflected(lemma).search, examples))
            for lemma in lemmas.split(", ")
        }
        lemma = max(found, key=lambda lemma: len(found[lemma]))
        if found[lemma]:
            word = lemma.lower(), labels[gloss].partition(".")[0]
            senses[word][gloss] = list(dict.fromkeys(found[lemma]))
    return senses


def _inflected(lemma):
    stem = lemma[:-1] if len(lemma) > 3 and lemma[-1] in "ey" else lemma
    endings = rf"(?:e|y|i|{re.escape(lemma[-1])})?(?:s|es|d|ed|ing|er|est)?"
    return re.compile(rf"\b{re.escape(stem)}{endings}\b", re.IGNORECASE)


def split_of(word):
    """The split of a word, by a hash."""
    number = int(hashlib.sha256(word.encode()).hexdigest()[:8], 16) % 1000
    return "test" if number < TEST else "valid" if number < TEST + VALID else "train"


def sense(senses):
    """Example and gloss, two senses of each word: `{split: rows}`."""
    made = {split: [] for split in SPLITS}
    for (lemma, part), glosses in senses.items():
        if len(glosses) > 1:
            rng = random.Random(f"{lemma} {part}")
            chosen = rng.sample(list(glosses), 2)
            examples = [f"{lemma}: {rng.choice(glosses[gloss])}" for gloss in chosen]
            made[split_of(lemma)] += crossed(chosen, examples, f"{lemma} {part}")
    return made


def wic(senses):
    """Two examples of a word: `{split: rows}`, the same number of each label a word."""
    made = {split: [] for split in SPLITS}
    for (lemma, part), glosses in senses.items():
        rng = random.Random(f"{lemma} {part}")
        repeated = [gloss for gloss in glosses if len(glosses[gloss]) > 1]
        if len(glosses) < 2 or not repeated:
            continue
        for gloss in rng.sample(repeated, min(PAIRS_A_WORD, len(repeated))):
            one, same = rng.sample(glosses[gloss], 2)
            other = rng.choice([g for g in glosses if g != gloss])
            for label, second in (("yes", same), ("no", rng.choice(glosses[other]))):
                # Either order: positives and negatives share their first example.
                pair = [one, second]
                rng.shuffle(pair)
                row = {"text": f"{lemma}: {pair[0]}", "text_pair": pair[1]}
                row |= {"label": label, "group": f"{lemma} {part}"}
                made[split_of(lemma)].append(row)
    return made


def write_pairs(data, output):
    """Write `output/TASK/{train,valid,test}.jsonl.gz` of the three tasks.

    Raises:
        FileNotFoundError: naming the missing file of `data`.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    packages = {split: _read(data, "synopsis", split) for split in SPLITS}
    train = [f"{row['text']}\n{row['summary']}" for row in packages["train"]]
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2).fit(train)
    labels = {
        row["text"]: row["label"]
        for split in SPLITS
        for row in _read(data, "supersense", split)
    }
    with gzip.open(Path(data) / "text/docs.txt.gz", "rt", encoding="utf-8") as file:
        senses = read_senses(file, labels)
    tasks = {
        "belongs": {s: belongs(rows, vectorizer) for s, rows in packages.items()},
        "sense": sense(senses),
        "wic": wic(senses),
    }
    for task, splits in tasks.items():
        for split, rows in splits.items():
            path = Path(output) / task / f"{split}.jsonl.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            with gzip.open(path, "wt", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)


def _read(data, folder, split):
    path = Path(data) / folder / f"{split}.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]

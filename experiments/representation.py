"""How well an adapted encoder represents text, against its decoder-only source.

    KERAS_BACKEND=jax OMP_NUM_THREADS=1 python experiments/representation.py
        --data DATA --runs RUNS [--sizes small] [--minutes N] [--only TEXT]

Five classification tasks (encoder_tasks.py, text_pairs.py); models with frozen weights,
under logistic regression on their states, and with all weights tuned. `RUNS` holds the
sources and the pretrained pairs of run.py. Each cell TASK/MODEL/MODE/SEED writes
`results/representation_*.json`; started again, finished cells are skipped.
"""

import argparse
import gc
import gzip
import json
import time
import warnings
from pathlib import Path

import corpus
import encoder_tasks
import grid
import keras
import keras_hub
import numpy as np
import run
import text_pairs

import keras_t5gemma as kt
from keras_t5gemma.conversion.adapt import adapt_to_folder
from keras_t5gemma.evaluation import measures
from keras_t5gemma.evaluation.tasks import Examples

RESULTS = Path(__file__).parent / "results"
# task: maximum number of training rows; tasks with long texts have fewer.
TASKS = {
    "supersense": 10_000,
    "section": 6_000,
    "belongs": 6_000,
    "sense": 10_000,
    "wic": 10_000,
}
# size: (source, its pairs)
SIZES = {
    "small": ("small", "small-small/prefixlm-long"),
    "shallow": ("shallow", "shallow-shallow/prefixlm"),
    "deep": ("deep", "deep-shallow/prefixlm"),
}
# Encoders of pairs pretrained here for grid.STEPS steps: texts as they are, and texts
# that are repeated once, of the pretraining mixture.
VARIANTS = {"mixture": (run.ONCE, run.TWICE), "documents": (2 * run.ONCE, 0)}
MODELS = ("encoder", "source", "scratch", "bidirectional", *VARIANTS)
CONTROLS = ("bidirectional", *VARIANTS)  # Only frozen.
MODES = ("frozen", "tuned")
SEEDS = (0, 1, 2)
TEST_ROWS, LENGTH, BATCH, EPOCHS = 3_000, 128, 32, 3
POOLINGS = ("mean", "last")
RATE = 3e-3  # That of the pairs' pretraining.


def read_task(folder, task):
    """`{split: (texts, labels, groups)}`; a pair is its texts on two lines."""
    splits = {}
    for split in text_pairs.SPLITS:
        path = Path(folder) / task / f"{split}.jsonl.gz"
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        groups = [str(row.get("group", i)) for i, row in enumerate(rows)]
        names = sorted(set(groups))
        names = [names[i] for i in np.random.default_rng(0).permutation(len(names))]
        place = {name: i for i, name in enumerate(names)}
        order = sorted(range(len(rows)), key=lambda i: place[groups[i]])
        order = order[: TASKS[task] if split == "train" else TEST_ROWS]
        texts = [
            "\n".join([r["text"], *filter(None, [r.get("text_pair")])]) for r in rows
        ]
        labels = [row["label"] for row in rows]
        splits[split] = tuple([c[i] for i in order] for c in (texts, labels, groups))
    known = set(splits["train"][1])
    for split, columns in splits.items():
        kept = [row for row in zip(*columns, strict=True) if row[1] in known]
        splits[split] = tuple(map(list, zip(*kept, strict=True)))
    return splits


class Models:
    """Backbones and preprocessors of one size.

    Args:
        size: of `SIZES`.
        args: of the command, the folders `data` and `runs`.
    """

    def __init__(self, size, args):
        source, pair = SIZES[size]
        self.data = args.data
        self.source = args.runs / f"sources/{source}/preset"
        self.folder = args.runs / f"representation/{size}"
        found = (args.runs / f"pretrain/{pair}/{seed}/preset" for seed in SEEDS)
        self.pairs = [preset for preset in found if preset.exists()]

    def load(self, model, seed):
        """`(backbone, preprocessor)` of one of `MODELS`.

        - encoder: of a pretrained pair, one of them for each seed.
        - source: decoder-only, with causal attention.
        - scratch: an encoder of the same shape with random weights.
        - bidirectional: the source with bidirectional attention, not trained further.
        - mixture, documents: see `VARIANTS`.
        """
        keras.utils.set_random_seed(seed)
        as_source = model in ("source", "bidirectional")
        template = "<bos>{text}" if as_source else None
        preprocessor = kt.Seq2SeqLMPreprocessor(
            corpus.tokenizer(), LENGTH, template=template
        )
        if model == "source":
            path = str(self.source)
            backbone = keras_hub.models.GemmaBackbone.from_preset(path)
            return backbone, preprocessor
        preset = self.pairs[seed % len(self.pairs)]
        if model == "bidirectional":
            preset = self._adapted()
        elif model in VARIANTS:
            preset = self._pretrained(model)
        backbone = kt.Backbone.from_preset(
            preset, load_weights=model != "scratch", encoder_only=True
        )
        return backbone, preprocessor

    def _adapted(self):
        preset = self.folder / "adapted"
        if not (preset / "config.json").exists():
            adapt_to_folder(str(self.source), folder=preset, overwrite=True)
        return preset

    def _pretrained(self, variant):
        folder = self.folder / variant
        if not (folder / "scores.json").exists():
            texts = self.folder / f"{variant}.jsonl"
            texts.parent.mkdir(parents=True, exist_ok=True)
            rows = corpus.mixture(self.data, *VARIANTS[variant])
            lines = [json.dumps({"text": text}) + "\n" for text in rows]
            texts.write_text("".join(lines), encoding="utf-8")
            kt.pretrain(
                self._adapted(),
                texts,
                folder,
                encoder_sequence_length=run.ENCODER,
                decoder_sequence_length=run.DECODER,
                batch_size=run.ROWS_A_STEP,
                max_steps=grid.STEPS,
                steps_per_epoch=grid.STEPS,
                learning_rate=3e-3,
                optimizer="adamw",
                overwrite=True,
                verbose=0,
            )
        return folder / "preset"


def frozen(models, model, seed, task):
    """Logistic regression on pooled states, with the pooling best on validation.

    Texts of a pair are embedded separately; a linear model on their joint state could
    not compare them.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    tried = []
    for pooling in POOLINGS:
        embedder = kt.TextEmbedder(
            *models.load(model, seed), pooling=pooling, normalize=False
        )
        states = {split: features(embedder.embed, task, split) for split in task}
        head = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        head.fit(states["train"], task["train"][1])
        valid = head.score(states["valid"], task["valid"][1])
        entry = {"pooling": pooling, "valid": 100 * valid}
        tried.append((entry, head.predict(states["test"]).tolist()))
    return best(tried)


def tuned(models, model, seed, task, pooling=None):
    """All weights trained, with the epoch best on validation.

    Args:
        models: `Models`.
        model: of `MODELS`.
        seed: of the training.
        task: of `read_task`.
        pooling: `None` tries all and takes the one best on validation.
    """
    poolings = POOLINGS if pooling is None else (pooling,)
    return best([train(models, model, seed, task, each) for each in poolings])


def best(tried):
    """The run that is best on validation, with all that were tried."""
    entry, predicted = max(tried, key=lambda run: run[0]["valid"])
    return {**entry, "tried": [each for each, _ in tried]}, predicted


def train(models, model, seed, task, pooling):
    """One training: AdamW, warm-up over 10 % of the steps, cosine decay to 0."""
    texts, labels, _ = task["train"]
    classifier = kt.TextClassifier(
        *models.load(model, seed), class_names=sorted(set(labels)), pooling=pooling
    )
    steps = EPOCHS * -(-len(texts) // BATCH)
    warmup = steps // 10
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warmup, warmup_target=RATE, warmup_steps=warmup
    )
    classifier.compile(keras.optimizers.AdamW(schedule, global_clipnorm=1.0))
    stopping = keras.callbacks.EarlyStopping(
        "val_accuracy", mode="max", patience=EPOCHS, restore_best_weights=True
    )
    history = classifier.fit(
        texts,
        labels,
        batch_size=BATCH,
        epochs=EPOCHS,
        validation_data=task["valid"][:2],
        callbacks=[stopping],
        verbose=0,
    ).history
    valid = 100 * max(history["val_accuracy"])
    entry = {"pooling": pooling, "learning_rate": RATE, "valid": valid}
    return entry, classifier.classify(task["test"][0])


def features(embed, task, split):
    """Vectors of texts; of pairs both vectors, their distances and their products."""
    texts = task[split][0]
    if not is_of_pairs(task):
        return embed(texts)
    one, two = (embed(list(half)) for half in zip(*map(halves, texts), strict=True))
    return np.concatenate([one, two, np.abs(one - two), one * two], axis=1)


def is_of_pairs(task):
    """Whether the texts of a task are pairs."""
    return set(task["train"][1]) == {"yes", "no"}


def halves(text):
    """The two texts of a pair; the first one is a single line."""
    first, _, second = text.partition("\n")
    return first, second


def lexical(task):
    """TF-IDF of words and bigrams under a linear SVM; for pairs also their overlap."""
    from scipy import sparse
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.svm import LinearSVC

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    words.fit(task["train"][0])

    def vectors(split):
        texts = task[split][0]
        if not is_of_pairs(task):
            return words.transform(texts)
        one, two = (words.transform(h) for h in zip(*map(halves, texts), strict=True))
        shared = one.multiply(two)
        overlap = sparse.csr_matrix(shared.sum(axis=1))
        return sparse.hstack([one, two, shared, overlap]).tocsr()

    model = LinearSVC().fit(vectors("train"), task["train"][1])
    valid = 100 * model.score(vectors("valid"), task["valid"][1])
    return {"valid": valid}, model.predict(vectors("test")).tolist()


def scores(predicted, task):
    """Accuracy, and right answers for each group of test rows, one digit a group."""
    _, labels, groups = task["test"]
    right, rows = {}, {}
    for answer, label, group in zip(predicted, labels, groups, strict=True):
        right[group] = right.get(group, 0) + (answer == label)
        rows[group] = rows.get(group, 0) + 1
    assert max(rows.values()) < 10
    found = measures.of_classes(predicted, Examples(None, labels))
    digits = {
        n: "".join(map(str, d.values())) for n, d in (("right", right), ("rows", rows))
    }
    return {**found, **digits}


def cells(sizes):
    """`(task, size, model, mode, seed)`, all tasks and baselines first."""
    for task in TASKS:
        yield task, "", "tfidf", "tuned", 0
    for size in sizes:
        for model in MODELS:
            for task in TASKS:
                for mode in MODES:
                    if mode == "tuned" and model in CONTROLS:
                        continue
                    is_one = model == "source" or model in CONTROLS
                    for seed in SEEDS[:1] if is_one and mode == "frozen" else SEEDS:
                        yield task, size, model, mode, seed


def path_of(task, size, model, mode, seed):
    """File of a cell's results."""
    name = f"{size}-{model}" if size else model
    return RESULTS / f"representation_{task}_{name}_{mode}_{seed}.json"


def make(task, size, model, mode, seed, models, rows):
    """Make one cell; write and return its results."""
    start = time.perf_counter()
    first = path_of(task, size, model, mode, SEEDS[0])
    if model == "tfidf":
        found, predicted = lexical(rows)
    elif mode == "frozen":
        found, predicted = frozen(models, model, seed, rows)
    elif seed == SEEDS[0]:
        found, predicted = tuned(models, model, seed, rows)
    else:
        chosen = json.loads(first.read_text(encoding="utf-8"))
        found, predicted = tuned(models, model, seed, rows, chosen["pooling"])
    cell = dict(task=task, size=size, model=model, mode=mode, seed=seed)
    found = {"cell": cell, **found, **scores(predicted, rows)}
    found["seconds"] = time.perf_counter() - start
    new = path_of(*cell.values()).with_suffix(".new")
    new.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    new.rename(path_of(*cell.values()))
    return found


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="start no cell after that time"
    )
    parser.add_argument(
        "--only", default="", help="only cells whose file contains this"
    )
    args = parser.parse_args()
    start = time.perf_counter()
    warnings.filterwarnings("ignore", "[0-9]+ of [0-9]+ encoder texts were longer")
    if keras.backend.backend() == "jax":
        kt.cache_compiled_programs(args.runs / "programs")
    folder = args.runs / "representation/tasks"
    if not folder.exists():
        new = folder.with_suffix(".new")
        encoder_tasks.write_tasks(args.data, new)
        text_pairs.write_pairs(args.data, new)
        new.rename(folder)
    RESULTS.mkdir(exist_ok=True)
    tasks = {}
    for cell in cells(args.sizes):
        path = path_of(*cell)
        if path.exists() or args.only not in path.name:
            continue
        if time.perf_counter() - start > 60 * args.minutes:
            return
        task, size, model, mode, seed = cell
        models = Models(size, args) if size else None
        if models and not (models.source.exists() and models.pairs):
            continue  # Not trained yet.
        if (model, mode) == ("encoder", "frozen") and seed >= len(models.pairs):
            continue
        if task not in tasks:
            tasks[task] = read_task(folder, task)
        found = make(*cell, models, tasks[task])
        print(
            f"{path.stem}: {found['accuracy']:.1f}, {found['seconds']:.0f} s",
            flush=True,
        )
        keras.backend.clear_session()
        gc.collect()
    print("done")


if __name__ == "__main__":
    main()

"""Fine-tune a decoder-only source on synopses: text, separator, synopsis.

The comparison for the pairs of run.py. Before fine-tuning it continues training on the
texts that the pairs were pretrained on, with the same number of rows and positions.
"""

from pathlib import Path

import corpus
import grid
import keras
import keras_hub
import numpy as np
import sources
from run import (
    DECODER,
    ENCODER,
    ONCE,
    ROWS_A_STEP,
    SOURCE,
    TARGET,
    TEST_ROWS,
    TWICE,
    latency,
)

import keras_t5gemma as kt

BATCH = 32


def run(run, args):
    """Train the source of a run; return losses, ROUGE, latency and cost."""
    source, copied = pretrained(run, args)
    backbone = source.backbone
    pairs = Pairs(corpus.tokenizer())
    train = corpus.read_synopsis(args.data, "train")
    train = {key: column[: grid.ROWS] for key, column in train.items()}
    batches = pairs.batches(train, run.seed)
    model = sources.trainer(source, 2e-3, len(batches))
    for batch in batches:
        loss = model.train_on_batch(*batch)  # The running mean over all batches.
    val_loss = evaluate(model, *pairs.arrays(corpus.read_synopsis(args.data, "valid")))
    test = corpus.read_synopsis(args.data, "test")
    test = {key: column[:TEST_ROWS] for key, column in test.items()}
    source.compile(sampler="greedy")
    prompts = pairs.prompts(test)
    answers = []
    for start in range(0, len(prompts), 50):
        answers += pairs.answer(source, prompts[start : start + 50])
    table = backbone.token_embedding.count_params()
    layers = backbone.count_params() - table
    return {
        "copied": copied,
        "loss": float(loss),
        "val_loss": val_loss,
        "scores": kt.score_texts(answers, test["decoder_text"], "rouge"),
        "milliseconds": latency(lambda p: pairs.answer(source, [p]), prompts),
        "flops": 2 * (100 * layers + 10 * table) / 1e6,
    }


def pretrained(run, args):
    """A source after the pairs' pretraining, and how well it copies."""
    keras.utils.set_random_seed(run.seed)
    preset = Path(args.runs) / f"sources/{run.pair}/preset"
    backbone = keras_hub.models.GemmaBackbone.from_preset(str(preset))
    source = keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=None)
    continue_pretraining(source, run, args)
    return source, copied(source, args)


def continue_pretraining(source, run, args):
    """Train on the pairs' pretraining texts, for the same number of steps."""
    texts = corpus.mixture(args.data, run.times * ONCE, run.times * TWICE)
    rows = corpus.chunks(texts, ENCODER + DECODER)
    rows = np.random.default_rng(run.seed).permutation(rows)
    steps = run.times * grid.STEPS
    x, y = sources.inputs(rows[np.arange(steps * ROWS_A_STEP) % len(rows)])
    model = sources.trainer(source, 3e-3, steps)
    model.fit(x, y, batch_size=ROWS_A_STEP, shuffle=False, verbose=0)


def copied(source, args):
    """Token accuracy on the second halves of held-out repeated paragraphs.

    The counterpart of `run.copied` for pairs, whose encoder reads the first half.
    """
    texts = corpus.doubled(corpus.held_out(args.data, 200))
    hits, losses = [], []
    pieces = corpus.tokenizer()
    for ids in pieces.tokenize(texts):
        row = np.zeros((1, SOURCE + TARGET + 1), "int32")
        ids = [pieces.start_token_id, *ids, pieces.end_token_id][: row.shape[1]]
        row[0, : len(ids)] = ids
        logits = source.predict_on_batch(_inputs(row[:, :-1]))[0].astype("float32")
        place = np.arange(len(ids) // 2, len(ids) - 1)
        wanted = row[0, place + 1]
        hits.append(logits[place].argmax(-1) == wanted)
        top = logits[place].max(-1)
        total = top + np.log(np.exp(logits[place] - top[:, None]).sum(-1))
        losses.append(total - logits[place, wanted])
    hits, losses = np.concatenate(hits), np.concatenate(losses)
    return {"accuracy": float(hits.mean()), "loss": float(losses.mean())}


def evaluate(model, x, y, weights):
    """Mean loss per target token; `evaluate` over batches would weight rows alike."""
    losses, tokens = [], []
    for start in range(0, len(y), BATCH):
        rows = slice(start, start + BATCH)
        batch = {key: value[rows] for key, value in x.items()}
        losses += [model.evaluate(batch, y[rows], None, 0, weights[rows])]
        tokens += [weights[rows].sum()]
    return float(np.average(losses, weights=tokens))


class Pairs:
    """Text pairs as decoder-only rows: bos, text, `<start_of_turn>`, synopsis, eos."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.separator = tokenizer.token_to_id("<start_of_turn>")

    def prompts(self, pairs):
        """Ids up to the separator, a list per text."""
        texts = self.tokenizer.tokenize(pairs["encoder_text"])
        return [[2, *ids[: SOURCE - 2], self.separator] for ids in texts]

    def arrays(self, pairs):
        """`(x, y, weights)` of padded rows; weights are 1 on synopsis tokens."""
        targets = [
            target[: TARGET - 1] + [1]
            for target in self.tokenizer.tokenize(pairs["decoder_text"])
        ]
        rows = [p + t for p, t in zip(self.prompts(pairs), targets, strict=True)]
        ids = np.zeros((len(rows), SOURCE + TARGET + 1), "int32")
        weights = np.zeros(ids.shape, "float32")
        for i, (row, target) in enumerate(zip(rows, targets, strict=True)):
            ids[i, : len(row)] = row
            weights[i, len(row) - len(target) : len(row)] = 1
        return _inputs(ids[:, :-1]), ids[:, 1:], weights[:, 1:]

    def batches(self, pairs, seed):
        """Batches of rows of similar length, as those of the pairs, shuffled."""
        x, y, weights = self.arrays(pairs)
        lengths = x["padding_mask"].sum(1)
        order = np.argsort(lengths, kind="stable")
        widths = [int(np.quantile(lengths, q)) + 1 for q in (0.25, 0.5, 0.75, 1.0)]
        batches = []
        for rows in np.array_split(order, len(order) // BATCH):
            longest = int(lengths[rows].max())
            width = next(min(w, y.shape[1]) for w in widths if w >= longest)
            batch = {key: value[rows, :width] for key, value in x.items()}
            batches.append((batch, y[rows, :width], weights[rows, :width]))
        np.random.default_rng(seed).shuffle(batches)
        return batches

    def answer(self, source, prompts):
        """Texts that a GemmaCausalLM generates for prompts, padded to one length."""
        ids = np.zeros((len(prompts), SOURCE + TARGET), "int32")
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt)] = prompt
        made = source.generate(_inputs(ids), stop_token_ids=[1])
        texts = []
        for row, prompt in zip(np.asarray(made["token_ids"]), prompts, strict=True):
            written = row[len(prompt) :].tolist()
            written = written[: written.index(1)] if 1 in written else written
            written = [i for i in written[:TARGET] if i > 0]
            texts.append(self.tokenizer.detokenize(written))
        return texts


def _inputs(ids):
    return {"token_ids": ids, "padding_mask": (ids > 0).astype("int32")}

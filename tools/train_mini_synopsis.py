"""Train the embedded preset `t5gemma_mini_synopsis` from nothing, on a CPU.

    python tools/train_mini_synopsis.py --data ../shared/data --run runs/mini \
        --minutes 90 --output runs/preset

Tokenizer, denoising warm-up, fine-tuning and evaluation, bounded in wall-clock
time: the learning rate follows the share of `--minutes` that is used up, so that a
slow machine ends with a finished, if less trained, model. Killed and started
again with the same `--run`, it goes on where it was, at most one round back.

A small model learns to copy last, so it first learns little else: from a text
with spans masked out, it writes a stretch of the original, starting anywhere. The
texts are short at first, because attention that still spreads evenly over ten
tokens already hears the right one.
"""

import argparse
import gzip
import json
import os
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import sentencepiece

import keras_t5gemma as kt
from keras_t5gemma.text.preprocessor import pad

VOCABULARY = 8192
MASK = 4
CONFIG = kt.T5GemmaConfig(
    encoder=kt.StackConfig(4, 256, 768, 4, 4, 64),
    decoder=kt.StackConfig(2, 256, 512, 4, 4, 64),
    vocabulary_size=VOCABULARY,
    max_positions=512,
)
ENCODER_LENGTH, DECODER_LENGTH = 160, 44
TOKENS_A_BATCH = 2560
STEPS_A_ROUND = 50

CARD = """# t5gemma_mini_synopsis

A small T5Gemma that shortens a Debian package description to one line.

{parameters} parameters: an encoder of 4 layers and a decoder of 2, width 256, an own
vocabulary of 8,192 pieces with Gemma's special ids; weights in bfloat16. It was
trained from nothing, not adapted from Gemma, and holds no Gemma weights.

## Data

Debian 12 (bookworm): 38,471 package descriptions and their synopses, and 75,421
paragraphs of descriptions for the denoising warm-up, all of source packages outside
the validation and test splits (split by sha256 of the source package's name, first
8 hex digits mod 1000: below 50 test, below 80 validation). The tokenizer also saw
60,000 lines of freely licensed documentation. The texts belong to their packages
and are not part of this project.

## Rebuild

`python tools/train_mini_synopsis.py --data DATA --minutes {minutes}`, where DATA holds
`synopsis/{{train,valid,test}}.jsonl.gz` and `text/{{descriptions,docs}}.txt.gz`. This
one took {steps} steps in that time, on 2 CPU cores that also did other work.

## Scores

Synopsis test (1,780 rows), ROUGE F1 x 100 with stemmer (rouge-score), chrF and BLEU
(sacrebleu):

| measure | greedy | beam search, 5 beams |
|---|---|---|
{rows}

The first ten words of the description score ROUGE-L 28.2 and BLEU 7.5; a
hand-written rule that strips "X is a" scores ROUGE-L 32.1 and BLEU 9.7.

## Limits

One task, one kind of English text, 160 tokens of input. Greedy decoding falls into
loops, beam search seldom does; both invent names and misspell rare ones. What holds
it back is the length of its training: the loss was still falling. It is here to show
the package with real weights, not to be relied on.
"""


def read_rows(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_lines(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [line.rstrip("\n") for line in file]


def train_tokenizer(rows, data, path):
    """A BPE of 8,192 pieces with byte fallback and Gemma's ids."""
    lines = [line for row in rows for line in row["text"].split("\n") if line]
    lines += [row["summary"] for row in rows]
    documentation = read_lines(data / "text/docs.txt.gz")
    np.random.default_rng(0).shuffle(documentation)
    lines += documentation[:60_000]
    controls = ["<mask>", "<2mass>", "[@BOS@]"]
    controls += [f"<unused{i}>" for i in range(99)]
    controls += ["<start_of_turn>", "<end_of_turn>"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line[:2000] for line in lines]),
        model_prefix=str(path.with_suffix("")),
        vocab_size=VOCABULARY,
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


def lean_towards_copying(backbone):
    """Start where an adapted Gemma 2 would: tokens know themselves.

    One embedding table for both sides; sub-layers that add little to the residual
    at first; cross-attention whose queries and keys agree, so that a token looks
    for itself in the source; values that come out as they went in.
    """
    table = backbone.encoder.token_embedding.embeddings
    table.assign(keras.ops.multiply(table, 256**-0.5 / 0.02))
    backbone.decoder.token_embedding.embeddings.assign(table)
    rng = np.random.default_rng(0)
    for variable in backbone.weights:
        if "/post_" in variable.path:
            variable.assign(np.full(variable.shape, -0.75))
    for block in [*backbone.encoder.blocks, *backbone.decoder.blocks]:
        attentions = [block.self_attention]
        if hasattr(block, "cross_attention"):
            attentions.append(block.cross_attention)
            match = rng.normal(0, 0.07, block.cross_attention.query.kernel.shape)
            block.cross_attention.query.kernel.assign(match)
            block.cross_attention.key.kernel.assign(match)
        for attention in attentions:
            value = rng.normal(0, 1 / 16, attention.value.kernel.shape)
            attention.value.kernel.assign(value)
            attention.output_projection.kernel.assign(value.T)


def batches(pairs, rng):
    """Index lists of pairs of like length, about TOKENS_A_BATCH tokens each."""
    order = rng.permutation(len(pairs))
    for start in range(0, len(order), 2048):
        pool = sorted(order[start : start + 2048], key=lambda i: len(pairs[i][0]))
        groups, group = [], []
        for i in pool:
            width = len(pairs[i][0]) + DECODER_LENGTH
            if group and width * (len(group) + 1) > TOKENS_A_BATCH:
                groups.append(group)
                group = []
            group.append(i)
        groups.append(group)
        for k in rng.permutation(len(groups)):
            yield groups[k]


def denoising_pair(ids, longest, starts_word, rng):
    """Mask spans of about 3 tokens, a fifth of the text; write some of it."""
    first = rng.integers(max(1, len(ids) - longest + 1))
    ids = ids[first : first + longest]
    keep = np.ones(len(ids), bool)
    for _ in range(max(1, len(ids) // 15)):
        start = rng.integers(len(ids))
        keep[start : start + rng.integers(1, 6)] = False
    source = []
    for i, token in enumerate(ids):
        if keep[i]:
            source.append(token)
        elif not source or source[-1] != MASK:
            source.append(MASK)
    starts = [i for i, token in enumerate(ids) if starts_word[token]] or [0]
    start = 0 if rng.random() < 0.3 else starts[rng.integers(len(starts))]
    return source, ids[start : start + DECODER_LENGTH - 1]


def arrays(pairs):
    """Arrays for `fit`, as the preprocessor makes them from text."""
    sources, targets = zip(*pairs, strict=True)
    inputs = [[2, *t[:-1]] for t in targets]
    encoder = pad(sources, max(map(len, sources)))
    decoder = pad(inputs, max(map(len, targets)))
    labels, mask = pad(targets, decoder[0].shape[1])
    x = {
        "encoder_token_ids": encoder[0],
        "encoder_padding_mask": encoder[1],
        "decoder_token_ids": decoder[0],
        "decoder_padding_mask": decoder[1],
    }
    return x, labels, mask.astype("float32")


def stream(pairs, texts, starts_word, rng, clock, warm_up):
    """Endless batches: denoising first, then the task with some denoising."""

    def forever(items):
        while True:
            yield from batches(items, rng)

    task, denoise = forever(pairs), forever([(t, None) for t in texts])
    while True:
        progress = clock.share() / warm_up
        if progress < 1 or rng.random() < 0.2:
            longest = int(np.clip(200 * progress - 30, 16, 128))
            repeat = 64 // longest if longest < 48 else 1
            chosen = [
                denoising_pair(texts[i], longest, starts_word, rng)
                for i in next(denoise)
                for _ in range(repeat)
            ]
        else:
            chosen = [pairs[i] for i in next(task)]
        yield arrays(chosen)


class Clock(keras.callbacks.Callback):
    """Learning rate and end by time used, kept in a file across restarts."""

    def __init__(self, path, minutes, peak):
        super().__init__()
        self.path, self.seconds, self.peak = path, minutes * 60, peak
        self.used = json.loads(path.read_text())["used"] if path.exists() else 0.0
        self.last = time.monotonic()

    def share(self):
        return (self.used + time.monotonic() - self.last) / self.seconds

    def on_train_batch_begin(self, batch, logs=None):
        warm = min(1.0, (float(self.model.optimizer.iterations) + 1) / 100)
        left = max(0.0, 1.0 - self.share())
        self.model.optimizer.learning_rate = self.peak * warm * min(1.0, left / 0.8)

    def on_epoch_end(self, epoch, logs=None):
        now = time.monotonic()
        self.used, self.last = self.used + now - self.last, now
        self.path.write_text(json.dumps({"used": self.used}))
        if self.share() >= 1:
            self.model.stop_training = True


def evaluate(model, rows, first=None):
    """ROUGE F1, BLEU and chrF of generated synopses against the real ones."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    rows = rows[:first]
    answers = model.generate([row["text"] for row in rows], batch_size=64)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    truth = [row["summary"] for row in rows]
    scores = [scorer.score(t, a) for t, a in zip(truth, answers, strict=True)]
    result = {
        name: 100 * float(np.mean([s[name].fmeasure for s in scores]))
        for name in ("rouge1", "rouge2", "rougeL")
    }
    result["chrf"] = sacrebleu.corpus_chrf(answers, [truth]).score
    result["bleu"] = sacrebleu.corpus_bleu(answers, [truth]).score
    result["rows"] = len(rows)
    return result, answers


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the data folder")
    parser.add_argument("--run", type=Path, default=Path("runs/mini"))
    parser.add_argument("--output", type=Path, default=Path("runs/preset"))
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--peak", type=float, default=1.5e-3, help="learning rate")
    parser.add_argument("--warm-up", type=float, default=0.2, help="share of time")
    args = parser.parse_args()
    if not (args.data / "synopsis/train.jsonl.gz").exists():
        parser.error(f"--data {args.data} has no synopsis/train.jsonl.gz")
    args.run.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(0)

    rows = read_rows(args.data / "synopsis/train.jsonl.gz")
    vocabulary = args.run / "vocabulary.model"
    if not vocabulary.exists():
        train_tokenizer(rows, args.data, vocabulary)
    tokenizer = kt.Tokenizer(str(vocabulary))
    preprocessor = kt.Seq2SeqLMPreprocessor(
        tokenizer, ENCODER_LENGTH, DECODER_LENGTH, pad_to_multiple_of=16
    )
    model = kt.Seq2SeqLM(kt.Backbone(CONFIG), preprocessor)
    lean_towards_copying(model.backbone)
    model.compile(
        optimizer=keras.optimizers.AdamW(
            args.peak, weight_decay=0.01, beta_2=0.98, global_clipnorm=1.0
        )
    )

    sources = tokenizer.tokenize([row["text"] for row in rows])
    targets = tokenizer.tokenize([row["summary"] for row in rows])
    pairs = [
        (source[:ENCODER_LENGTH], [*target, 1][:DECODER_LENGTH])
        for source, target in zip(sources, targets, strict=True)
    ]
    texts = tokenizer.tokenize(read_lines(args.data / "text/descriptions.txt.gz"))
    texts = [t[:128] for t in texts if len(t) >= 16]
    starts_word = np.array([p.startswith("\u2581") for p in tokenizer.get_vocabulary()])
    valid = read_rows(args.data / "synopsis/valid.jsonl.gz")

    clock = Clock(args.run / "clock.json", args.minutes, args.peak)
    log = args.run / "log.csv"
    rng = np.random.default_rng([0, int(clock.used)])
    finished = args.run / "trained.weights.h5"
    if finished.exists():
        model.load_weights(finished)
    else:
        model.fit(
            stream(pairs, texts, starts_word, rng, clock, args.warm_up),
            steps_per_epoch=STEPS_A_ROUND,
            epochs=100_000,
            validation_data={
                "encoder_text": [row["text"] for row in valid[:256]],
                "decoder_text": [row["summary"] for row in valid[:256]],
            },
            validation_freq=5,
            callbacks=[
                keras.callbacks.BackupAndRestore(
                    str(args.run / "backup"), delete_checkpoint=False
                ),
                clock,
                keras.callbacks.CSVLogger(str(log), append=log.exists()),
            ],
            verbose=1 if os.isatty(1) else 2,
        )
        model.save_weights(finished)
    export(model, args.output)
    shipped = kt.Seq2SeqLM.from_preset(args.output)
    scores, test = {}, read_rows(args.data / "synopsis/test.jsonl.gz")
    for sampler in ("greedy", "beam"):
        shipped.compile(sampler=sampler)
        scores[sampler], answers = evaluate(shipped, test)
        (args.run / f"answers.{sampler}.txt").write_text("\n".join(answers))
        print(sampler, json.dumps(scores[sampler]))
    steps = int(log.read_text().splitlines()[-1].split(",")[0]) * STEPS_A_ROUND
    write_card(args.output, scores, clock.used / 60, steps)


def export(model, folder):
    """Save the model in bfloat16, half the size of what was trained."""
    half = kt.Backbone(model.backbone.config, dtype="bfloat16")
    for ours, trained in zip(half.weights, model.backbone.weights, strict=True):
        ours.assign(keras.ops.cast(trained, "bfloat16"))
    kt.Seq2SeqLM(half, model.preprocessor).save_to_preset(str(folder))


def write_card(folder, scores, minutes, steps):
    """The model card, with what was measured."""
    rows = "\n".join(
        f"| {name} | {scores['greedy'][name]:.1f} | {scores['beam'][name]:.1f} |"
        for name in ("rouge1", "rouge2", "rougeL", "chrf", "bleu")
    )
    (folder / "README.md").write_text(
        CARD.format(
            parameters=f"{CONFIG.count_params():,}",
            rows=rows,
            minutes=round(minutes),
            steps=steps,
        )
    )


if __name__ == "__main__":
    main()

"""Make the runs of the experiment, one process each; those that are done are kept.

    KERAS_BACKEND=jax python experiments/run.py --data DATA --runs RUNS [--minutes N]
        [--only TEXT]

The runs are those of grid.py; the decoder-only sources of a run (sources.py) are
trained when it needs them. A run that was stopped goes on where its last backup was.
What a run measured is written to `experiments/results/`, from which report.py makes
tables and pictures.
"""

import argparse
import contextlib
import csv
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import grid

RESULTS = Path(__file__).parent / "results"
ENCODER, DECODER, ROWS_A_STEP = 128, 128, 8
SOURCE, TARGET = 256, 40  # Lengths of the synopsis pairs.
ONCE, TWICE = 3_000, 13_000  # Texts of the pretraining that say it once and twice.
TEST_ROWS = 500  # Of the synopsis test that answers are scored on.
TIMED_ROWS = 50


def write_texts(data, runs):
    """The corpus as files of JSON lines."""
    import corpus

    folder = Path(runs) / "texts"
    for name, make in (
        # What all runs share: what they see, not in which order.
        ("mixture", lambda: corpus.mixture(data, ONCE, TWICE)),
        ("valid", lambda: corpus.held_out(data, 200)),
        ("doubled-valid", lambda: corpus.doubled(corpus.held_out(data, 200))),
    ):
        path = folder / f"{name}.jsonl"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps({"text": text}) + "\n" for text in make()]
            new = path.with_suffix(".new")
            new.write_text("".join(lines), encoding="utf-8")
            new.rename(path)
    return folder


def start_preset(run, runs):
    """The folder of the preset that a run starts from, made if it is not there."""
    runs = Path(runs)
    if "/" in run.start:
        return runs / run.start / "preset"
    folder = runs / f"start/{run.pair}-{run.start}"
    if (folder / "config.json").exists():
        return folder
    import keras

    import keras_t5gemma as kt
    from keras_t5gemma.conversion.adapt import adapt_to_folder

    encoder, decoder = (
        str(runs / f"sources/{size}/preset") for size in grid.PAIRS[run.pair]
    )
    options = {}
    if run.start == "random-cross":
        options["cross_attention"] = "random"
    adapt_to_folder(encoder, decoder, folder=folder, overwrite=True, **options)
    if run.start == "scratch":
        adapted = kt.Seq2SeqLM.from_preset(folder)
        keras.utils.set_random_seed(0)
        backbone = kt.Backbone(adapted.backbone.config)
        kt.Seq2SeqLM(backbone, adapted.preprocessor).save_to_preset(folder)
    return folder


@contextlib.contextmanager
def encoder_mask(causal):
    """Make causal attention the default of encoders, if asked for."""
    from keras_t5gemma.modeling.towers import Encoder

    call = Encoder.call
    if causal:
        Encoder.call = functools.partialmethod(call, causal=True)
    try:
        yield
    finally:
        Encoder.call = call


def pretrain(run, args):
    """Continue pretraining; the loss on held-out texts, against tokens seen."""
    import keras_t5gemma as kt

    texts = write_texts(args.data, args.runs)
    options = dict(run.options)
    if "teacher" in options:
        teacher = Path(args.runs) / f"sources/{options['teacher']}/preset"
        options["teacher"] = str(teacher)
        options["teacher_scores"] = str(Path(args.runs) / "teacher-scores")
    folder = Path(args.runs) / run.name
    scores = kt.pretrain(
        start_preset(run, args.runs),
        texts / "mixture.jsonl",
        folder,
        texts / "valid.jsonl",
        encoder_sequence_length=ENCODER,
        decoder_sequence_length=DECODER,
        batch_size=ROWS_A_STEP,
        max_steps=grid.STEPS,
        steps_per_epoch=grid.STEPS // 10,
        learning_rate=3e-3,
        optimizer="adamw",
        seed=run.seed,
        overwrite=True,
        verbose=0,
        **options,
    )
    with open(folder / "log.csv", encoding="utf-8") as file:
        log = [
            {"epoch": int(r["epoch"]), "loss": float(r["loss"])}
            | {n: float(r[n]) for n in ("val_loss", "val_accuracy", "padding")}
            for r in csv.DictReader(file)
        ]
    positions = grid.STEPS // 10 * ROWS_A_STEP * (ENCODER + DECODER)
    tokens = 0
    for row in log:
        tokens += round(positions * (1 - row["padding"]))
        row["tokens"] = tokens
    return {"log": log, "scores": scores, "copied": copied(folder / "preset", texts)}


def copied(preset, texts):
    """Share of the tokens right where a held-out paragraph says itself twice, PrefixLM.

    What is read is what is to be written, so that it need only be copied.
    """
    import keras_t5gemma as kt

    preprocessor = kt.Seq2SeqLMPreprocessor.from_preset(
        preset, objective=kt.objectives.PrefixLM(), encoder_sequence_length=ENCODER
    )
    preprocessor.decoder_sequence_length = DECODER
    model = kt.Seq2SeqLM.from_preset(preset, preprocessor=preprocessor)
    model.compile(weighted_metrics=["accuracy"])
    lines = (texts / "doubled-valid.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["text"] for line in lines]
    return model.evaluate(rows, batch_size=ROWS_A_STEP, return_dict=True, verbose=0)


def synopsis(run, args):
    """Fine-tune on synopses; loss of validation and test, ROUGE, latency."""
    import corpus
    import keras

    import keras_t5gemma as kt

    keras.utils.set_random_seed(run.seed)
    preprocessor = kt.Seq2SeqLMPreprocessor(corpus.tokenizer(), SOURCE, TARGET)
    preset = start_preset(run, args.runs)
    model = kt.Seq2SeqLM.from_preset(preset, preprocessor=preprocessor)
    train = corpus.read_synopsis(args.data, "train")
    rows = {key: column[: grid.ROWS] for key, column in train.items()}
    steps = grid.ROWS // 32
    import sources

    model.compile(optimizer=sources.optimizer(2e-3, steps))
    history = model.fit(rows, batch_size=32, verbose=0)
    valid = corpus.read_synopsis(args.data, "valid")
    logs = model.evaluate(valid, return_dict=True, verbose=0)
    test = corpus.read_synopsis(args.data, "test")
    texts = test["encoder_text"][:TEST_ROWS]
    answers = model.generate(texts)
    scores = kt.score_texts(answers, test["decoder_text"][:TEST_ROWS], "rouge")
    one = lambda text: model.generate(text)  # noqa: E731
    return {
        "loss": history.history["loss"][0],
        "val_loss": logs["loss"],
        "scores": scores,
        "milliseconds": latency(one, texts),
        "flops": pair_flops(model.backbone),
    }


def latency(answer, texts):
    """Median milliseconds of an answer to one text, after one of each length."""
    seconds = []
    for text in [*texts[:TIMED_ROWS], *texts[:TIMED_ROWS]]:
        start = time.perf_counter()
        answer(text)
        seconds.append(time.perf_counter() - start)
    return 1e3 * sorted(seconds[TIMED_ROWS:])[TIMED_ROWS // 2]


def pair_flops(backbone, source=90, target=10):
    """Million operations of an answer: twice the weights that each token meets."""
    encoder, decoder = (
        sum(w.size for w in tower.get_weights()) - tower.token_embedding.count_params()
        for tower in (backbone.encoder, backbone.decoder)
    )
    table = backbone.decoder.token_embedding.count_params()
    return 2 * (source * encoder + target * (decoder + table)) / 1e6


def decoder_only(run, args):
    """The same of the source model itself: text, a separator, synopsis.

    First it goes on with as many rows, of as many positions, of the pairs' texts.
    """
    import corpus
    import keras
    import keras_hub
    import numpy as np
    import sources

    import keras_t5gemma as kt

    keras.utils.set_random_seed(run.seed)
    pieces = corpus.tokenizer()
    preset = Path(args.runs) / f"sources/{run.pair}/preset"
    backbone = keras_hub.models.GemmaBackbone.from_preset(str(preset))
    source = keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=None)
    rows = corpus.chunks(corpus.mixture(args.data, ONCE, TWICE), ENCODER + DECODER)
    rows = np.random.default_rng(run.seed).permutation(rows)
    x, y = sources.inputs(rows[: grid.STEPS * ROWS_A_STEP])
    model = sources.trainer(source, 3e-3, grid.STEPS)
    model.fit(x, y, batch_size=ROWS_A_STEP, shuffle=False, verbose=0)
    turn = pieces.token_to_id("<start_of_turn>")

    def prompts(pairs):
        texts = pieces.tokenize(pairs["encoder_text"])
        return [[2, *ids[: SOURCE - 2], turn] for ids in texts]

    def arrays(pairs):
        targets = [
            t[: TARGET - 1] + [1] for t in pieces.tokenize(pairs["decoder_text"])
        ]
        rows = [p + t for p, t in zip(prompts(pairs), targets, strict=True)]
        ids = np.zeros((len(rows), SOURCE + TARGET + 1), "int32")
        weights = np.zeros(ids.shape, "float32")
        for i, (row, target) in enumerate(zip(rows, targets, strict=True)):
            ids[i, : len(row)] = row
            weights[i, len(row) - len(target) : len(row)] = 1
        x = {
            "token_ids": ids[:, :-1],
            "padding_mask": (ids[:, :-1] > 0).astype("int32"),
        }
        return x, ids[:, 1:], weights[:, 1:]

    train = corpus.read_synopsis(args.data, "train")
    train = {key: column[: grid.ROWS] for key, column in train.items()}
    # Rows of similar length together, cut to the longest: as the pairs are.
    x, y, weights = arrays(train)
    lengths = x["padding_mask"].sum(1)
    order = np.argsort(lengths, kind="stable")
    widths = [int(np.quantile(lengths, q)) + 1 for q in (0.25, 0.5, 0.75, 1.0)]
    batches = []
    for rows in np.array_split(order, len(order) // 32):
        longest = int(lengths[rows].max())
        width = next(min(w, y.shape[1]) for w in widths if w >= longest)
        batch = {key: value[rows, :width] for key, value in x.items()}
        batches.append((batch, y[rows, :width], weights[rows, :width]))
    np.random.default_rng(run.seed).shuffle(batches)
    model = sources.trainer(source, 2e-3, len(batches))
    for batch in batches:
        loss = model.train_on_batch(*batch)  # The mean of all so far.
    valid = corpus.read_synopsis(args.data, "valid")
    x, y, weights = arrays(valid)
    val_losses, tokens = [], []
    for start in range(0, len(y), 32):  # Over batches `evaluate` weighs rows alike.
        rows = slice(start, start + 32)
        batch = {key: value[rows] for key, value in x.items()}
        val_losses += [model.evaluate(batch, y[rows], None, 0, weights[rows])]
        tokens += [weights[rows].sum()]
    test = corpus.read_synopsis(args.data, "test")
    test = {key: column[:TEST_ROWS] for key, column in test.items()}
    source.compile(sampler="greedy")

    def answer(rows):
        ids = np.zeros((len(rows), SOURCE + TARGET), "int32")
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        made = source.generate(
            {"token_ids": ids, "padding_mask": (ids > 0).astype("int32")},
            stop_token_ids=[1],
        )
        texts = []
        for row, prompt in zip(np.asarray(made["token_ids"]), rows, strict=True):
            written = row[len(prompt) :].tolist()
            written = written[: written.index(1)] if 1 in written else written
            texts.append(pieces.detokenize([i for i in written[:TARGET] if i > 0]))
        return texts

    rows = prompts(test)
    answers = []
    for start in range(0, len(rows), 50):
        answers += answer(rows[start : start + 50])
    scores = kt.score_texts(answers, test["decoder_text"], "rouge")
    table = backbone.token_embedding.count_params()
    layers = backbone.count_params() - table
    return {
        "loss": float(loss),
        "val_loss": float(np.average(val_losses, weights=tokens)),
        "scores": scores,
        "milliseconds": latency(lambda row: answer([row]), rows),
        "flops": 2 * (100 * layers + 10 * table) / 1e6,
    }


KINDS = {"pretrain": pretrain, "synopsis": synopsis, "decoder-only": decoder_only}


def make(run, args):
    """One run, in this process; its results go to a file."""
    import keras_t5gemma as kt

    if os.environ.get("KERAS_BACKEND") == "jax":
        kt.cache_compiled_programs(args.runs / "programs")
    start = time.perf_counter()
    with encoder_mask(run.causal_encoder):
        result = KINDS[run.kind](run, args)
    result["seconds"] = time.perf_counter() - start
    path = RESULTS / f"{run.name.replace('/', '_')}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"run": vars(run), **result}, indent=1) + "\n")


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after")
    parser.add_argument("--only", default="", help="runs with this in their names")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    runs = [run for run in grid.make_plan() if args.only in run.name]
    if args.task:
        make(next(run for run in grid.make_plan() if run.name == args.task), args)
        return
    start = time.perf_counter()
    here = Path(__file__).parent
    common = ["--data", str(args.data), "--runs", str(args.runs)]
    for i, run in enumerate(runs):
        if (RESULTS / f"{run.name.replace('/', '_')}.json").exists():
            continue
        if time.perf_counter() - start > 60 * args.minutes:
            break
        print(f"{i + 1} of {len(runs)}: {run.name}", flush=True)
        for size in grid.sources_of(run):
            command = [sys.executable, here / "sources.py", size, *common]
            subprocess.run(command, check=True)
        names = [run.name]
        if "/" in run.start and not (args.runs / run.start / "preset").exists():
            names.insert(0, run.start)  # Its results are here, its weights are not.
        for name in names:
            command = [sys.executable, __file__, *common, "--task", name]
            if subprocess.run(command).returncode:
                print(f"{name} failed; the next time it is made again", flush=True)
                break


if __name__ == "__main__":
    main()

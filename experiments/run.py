"""Run the experiment grid, one process per run; finished runs are skipped.

    KERAS_BACKEND=jax python experiments/run.py --data DATA --runs RUNS [--minutes N]
        [--only TEXT]

grid.py lists the runs. Decoder-only sources (sources.py) are trained when a run needs
them. An interrupted run resumes from its last backup. Results go to
`experiments/results/`, from which report.py makes tables and figures.
"""

import argparse
import contextlib
import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import grid

RESULTS = Path(__file__).parent / "results"
ENCODER, DECODER, ROWS_A_STEP = 128, 128, 8
SOURCE, TARGET = 256, 40  # Lengths of the synopsis pairs.
ONCE, TWICE = 3_000, 13_000  # Pretraining texts as they are, and repeated ones.
TEST_ROWS = 500  # Synopsis test rows that generation is scored on.
TIMED_ROWS = 50


def write_texts(data, runs, times=1):
    """Write the pretraining and held-out texts as JSON lines.

    Args:
        data: folder of the data.
        runs: folder of the runs.
        times: write this many times the pretraining texts.

    Returns:
        The paths of the pretraining texts and of the folder.
    """
    import corpus

    folder = Path(runs) / "texts"
    mixture = "mixture" if times == 1 else f"mixture-{times}"
    for name, make in (
        # All runs see the same texts, in different orders.
        (mixture, lambda: corpus.mixture(data, times * ONCE, times * TWICE)),
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
    return folder / f"{mixture}.jsonl", folder


def start_preset(run, runs):
    """Folder of the preset that a run starts from, made on first use."""
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
    """Give all encoders causal attention if `causal`."""
    from keras_t5gemma.modeling.towers import Encoder

    masks = Encoder._self_masks
    if causal:
        # Not the default of `call`: `Backbone.encode` passes the argument.
        Encoder._self_masks = lambda self, padding, _: masks(self, padding, True)
    try:
        yield
    finally:
        Encoder._self_masks = masks


def pretrain(run, args):
    """Continue pretraining; return held-out losses by tokens seen."""
    import keras_t5gemma as kt

    mixture, texts = write_texts(args.data, args.runs, run.times)
    steps = run.times * grid.STEPS
    options = dict(run.options)
    if "teacher" in options:
        size = options["teacher"]
        options["teacher"] = str(teacher_preset(size, run, args))
        scores = Path(args.runs) / f"teacher-scores/{size}-{run.times}"
        options["teacher_scores"] = str(scores)
    folder = Path(args.runs) / run.name
    scores = kt.pretrain(
        start_preset(run, args.runs),
        mixture,
        folder,
        texts / "valid.jsonl",
        encoder_sequence_length=ENCODER,
        decoder_sequence_length=DECODER,
        batch_size=ROWS_A_STEP,
        max_steps=steps,
        steps_per_epoch=steps // 10,
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
    positions = steps // 10 * ROWS_A_STEP * (ENCODER + DECODER)
    tokens = 0
    for row in log:
        tokens += round(positions * (1 - row["padding"]))
        row["tokens"] = tokens
    return {"log": log, "scores": scores, "copied": copied(folder / "preset", texts)}


def teacher_preset(teacher, run, args):
    """Folder of a teacher: a source, or one that has learned to copy, see grid.py."""
    size = teacher.removesuffix(grid.COPYING)
    source = Path(args.runs) / f"sources/{size}/preset"
    if size == teacher:
        return source
    folder = Path(args.runs) / f"teachers/{teacher}-{run.times}/preset"
    if not folder.exists():
        import decoder_only

        as_source = dataclasses.replace(run, pair=size, seed=0)
        model, copied = decoder_only.pretrained(as_source, args)
        print(f"{teacher}: {copied}", flush=True)
        new = folder.with_name("new")
        model.backbone.save_to_preset(str(new))
        shutil.copytree(source / "assets", new / "assets", dirs_exist_ok=True)
        new.rename(folder)
    return folder


def copied(preset, texts):
    """PrefixLM token accuracy on held-out paragraphs that are repeated once.

    The encoder's half equals the target, so the model only has to copy.
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
    """Fine-tune on synopses; return losses, ROUGE and latency."""
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
    """Median milliseconds per answer, batch 1, after a pass that compiles."""
    seconds = []
    for text in [*texts[:TIMED_ROWS], *texts[:TIMED_ROWS]]:
        start = time.perf_counter()
        answer(text)
        seconds.append(time.perf_counter() - start)
    return 1e3 * sorted(seconds[TIMED_ROWS:])[TIMED_ROWS // 2]


def pair_flops(backbone, source=90, target=10):
    """MFLOPs per answer: two per weight and token that passes it."""
    encoder, decoder = (
        sum(w.size for w in tower.get_weights()) - tower.token_embedding.count_params()
        for tower in (backbone.encoder, backbone.decoder)
    )
    table = backbone.decoder.token_embedding.count_params()
    return 2 * (source * encoder + target * (decoder + table)) / 1e6


def decoder_only(run, args):
    """Fine-tune and measure a decoder-only source in the same way."""
    import decoder_only as experiment

    return experiment.run(run, args)


def copying(run, args):
    """Measure what a decoder-only source copies, without fine-tuning it."""
    import decoder_only as experiment

    return {"copied": experiment.pretrained(run, args)[1]}


KINDS = {
    "pretrain": pretrain,
    "synopsis": synopsis,
    "decoder-only": decoder_only,
    "copying": copying,
}


def make(run, args):
    """Make one run in this process and write its results."""
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
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="start no run after that time"
    )
    parser.add_argument("--only", default="", help="only runs whose name contains this")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    runs = [run for run in grid.make_grid() if args.only in run.name]
    if args.task:
        make(next(run for run in grid.make_grid() if run.name == args.task), args)
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
            names.insert(0, run.start)  # Has results, but its weights are gone.
        for name in names:
            command = [sys.executable, __file__, *common, "--task", name]
            if subprocess.run(command).returncode:
                print(f"{name} failed; call again to retry", flush=True)
                break


if __name__ == "__main__":
    main()

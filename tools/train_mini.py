"""Train the embedded presets by the paper's recipe, on a CPU.

    KERAS_BACKEND=jax python tools/train_mini.py --data DATA --runs RUNS

A decoder-only model with KerasHub (experiments/sources.py), adapted to a balanced pair,
pretrained with PrefixLM on plain text, fine-tuned on package synopses. A small model
learns last to copy from what its encoder has read, so a part of the plain text says
everything twice: then the half that is read is the half that is to be written.

Every step keeps backups: killed and started again, it goes on where it was. In the end
`RUNS/mini/presets` holds both, in bfloat16, with their cards.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import corpus  # noqa: E402

import keras_t5gemma as kt  # noqa: E402
from keras_t5gemma.conversion.adapt import adapt_to_folder
from keras_t5gemma.conversion.convert import convert

SIZE = "large"
ONCE, TWICE, LONGEST = 6_000, 10_000, 400  # Of `corpus.mixture`.


def write_mixture(data, folder):
    """The texts of the pretraining, and held-out ones, as JSON lines."""
    paths = [folder / f"{name}.jsonl" for name in ("mixture", "held-out")]
    if not paths[1].exists():
        folder.mkdir(parents=True, exist_ok=True)
        texts = corpus.mixture(data, ONCE, TWICE, LONGEST), corpus.held_out(data)
        for path, part in zip(paths, texts, strict=True):
            rows = [json.dumps({"text": text}) + "\n" for text in part]
            path.write_text("".join(rows), encoding="utf-8")
    return paths


ABOUT = """# {name}

{what}

{parameters} parameters: three layers of width 192 on either side, an own vocabulary of
8,192 pieces with Gemma's special ids; weights in bfloat16. It holds no Gemma weights.

## How it was made

By the paper's recipe (arXiv 2504.06225): a decoder-only Gemma 2 of three layers,
trained with KerasHub on {source_tokens:.1f} million tokens; adapted to a pair of two of
it, the cross-attention a copy; pretrained with PrefixLM for {steps} steps of 8 rows of
128 + 128 tokens, where {twice} of {documents} texts say everything twice, so that it
learns to copy from what it has read{tuning}.

## Data

Debian 12 (bookworm): package descriptions, documentation, the King James Bible, WordNet
glosses; package descriptions only of source packages outside the validation and test
splits (split by sha256 of the source package's name, first 8 hex digits mod 1000:
below 50 test, below 80 validation). The texts belong to their authors and are not part
of this project.

## Rebuild

`KERAS_BACKEND=jax python tools/train_mini.py --data DATA --runs RUNS`, where DATA holds
`synopsis/{{train,valid,test}}.jsonl.gz` and `text/{{descriptions,docs}}.txt.gz`.

## Scores

{scores}

## Limits

A very small model of one kind of English text. It is here to show the package with real
weights, not to be relied on.
"""
WHAT = {
    "t5gemma_mini": "A small T5Gemma that has read plain text, to be fine-tuned.",
    "t5gemma_mini_synopsis": "A small T5Gemma that shortens a Debian package "
    "description to one line.",
}


def publish(name, run, args, folder):
    """A preset in bfloat16, measured as it is shipped, with its card."""
    output = folder / "presets" / name
    convert(str(run / "preset"), output, dtype="bfloat16", overwrite=True)
    model = kt.Seq2SeqLM.from_preset(output)
    log = json.loads((args.runs / f"sources/{SIZE}/log.json").read_text())
    pretraining = json.loads((folder / "pretrained/scores.json").read_text())
    tuning = ""
    if name.endswith("synopsis"):
        scores = measure(model, args.data)
        tuning = f"; fine-tuned for {args.epochs} epochs on 38,471 synopses"
    else:
        loss = pretraining["valid"]["loss"]
        scores = (
            "Loss of the second halves of 400 held-out texts, a token: "
            f"{loss['mean']:.2f}, "
            f"{loss['before']:.2f} before the pretraining."
        )
    text = ABOUT.format(
        name=name,
        what=WHAT[name],
        parameters=f"{model.backbone.config.count_params():,}",
        source_tokens=log[-1]["tokens"] / 1e6,
        steps=args.pretraining_steps,
        twice=f"{TWICE:,}",
        documents=f"{ONCE + TWICE:,}",
        tuning=tuning,
        scores=scores,
    )
    (output / "README.md").write_text(text, encoding="utf-8")


def measure(model, data):
    """Scores on the synopsis test, greedy and with beams, as text."""
    test = corpus.read_synopsis(data, "test")
    columns = {}
    for title, options in (("greedy", {}), ("5 beams", {"num_beams": 5})):
        answers = model.generate(test["encoder_text"], **options)
        metrics = ["rouge", "bleu", "chrf"]
        columns[title] = kt.score_texts(answers, test["decoder_text"], metrics)
    lines = [f"| synopsis test, 1,780 rows | {' | '.join(columns)} |", "|---|---|---|"]
    for name in columns["greedy"]:
        cells = [f"{c[name]['mean']:.1f}" for c in columns.values()]
        error = columns["greedy"][name]["standard_error"]
        lines.append(f"| {name} (± {error:.1f}) | {' | '.join(cells)} |")
    return "\n".join(lines) + (
        "\n\nThe first ten words of the description score ROUGE-L 28.2; a hand-written "
        'rule that strips\n"X is a" scores ROUGE-L 32.1 and BLEU 9.7.'
    )


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--pretraining-steps", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    common = ["--data", str(args.data), "--runs", str(args.runs)]
    sources = ROOT / "experiments/sources.py"
    subprocess.run([sys.executable, sources, SIZE, *common], check=True)
    folder = args.runs / "mini"
    source = args.runs / f"sources/{SIZE}/preset"
    adapted = folder / "adapted"
    if not (adapted / "config.json").exists():
        adapt_to_folder(str(source), folder=adapted)
    texts, held_out = write_mixture(args.data, folder)
    pretrained = folder / "pretrained"
    if not (pretrained / "scores.json").exists():
        kt.pretrain(
            str(adapted),
            [str(texts)],
            str(pretrained),
            [str(held_out)],
            encoder_sequence_length=128,
            decoder_sequence_length=128,
            batch_size=8,
            max_steps=args.pretraining_steps,
            optimizer="adamw",
            learning_rate=2e-3,
            weight_decay=0.01,
            save_freq=100,
        )
    finetuned = folder / "finetuned"
    if not (finetuned / "scores.json").exists():
        data = args.data / "synopsis"
        kt.finetune(
            str(pretrained / "preset"),
            str(data / "train.jsonl.gz"),
            str(finetuned),
            str(data / "valid.jsonl.gz"),
            str(data / "test.jsonl.gz"),
            source="text",
            target="summary",
            encoder_sequence_length=224,
            decoder_sequence_length=40,
            epochs=args.epochs,
            optimizer="adamw",
            learning_rate=1.5e-3,
            schedule="cosine",
            warmup_steps=100,
            weight_decay=0.01,
            label_smoothing=0.1,
            monitor="val_loss",
            sample_rows=200,
            save_freq=100,
        )
    publish("t5gemma_mini", pretrained, args, folder)
    publish("t5gemma_mini_synopsis", finetuned, args, folder)


if __name__ == "__main__":
    main()

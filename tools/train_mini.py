"""Train the embedded presets with the paper's recipe, on a CPU.

    KERAS_BACKEND=jax python tools/train_mini.py --data DATA --runs RUNS

Trains a decoder-only model with KerasHub (experiments/sources.py), adapts it to a
balanced pair, pretrains that with PrefixLM on plain text and fine-tunes it on package
synopses. Copying from the encoder is what a small model learns last, so part of the
plain text repeats every paragraph: the encoder's half then equals the target.

Every step keeps backups: started again after an interruption, it resumes. At the end
`RUNS/mini/presets` holds both presets, in bfloat16, with their model cards.
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
from keras_t5gemma.recipes.model_card import card_metadata, eval_result, save_card

SIZE = "large"
ONCE, TWICE, LONGEST = 6_000, 10_000, 400  # Of `corpus.mixture`.


def write_mixture(data, folder):
    """Write the pretraining texts and the held-out texts as JSON lines."""
    paths = [folder / f"{name}.jsonl" for name in ("mixture", "held-out")]
    if not paths[1].exists():
        folder.mkdir(parents=True, exist_ok=True)
        texts = corpus.mixture(data, ONCE, TWICE, LONGEST), corpus.held_out(data)
        for path, part in zip(paths, texts, strict=True):
            rows = [json.dumps({"text": text}) + "\n" for text in part]
            path.write_text("".join(rows), encoding="utf-8")
    return paths


CARD = """# {name}

{description}

{parameters:,} parameters: three layers of width 192 in the encoder and in the decoder,
an 8,192-piece vocabulary with Gemma's special ids, weights in bfloat16. It contains no
Gemma weights.

## How it was made

Following the paper (arXiv 2504.06225): a decoder-only Gemma 2 of three layers, trained
with KerasHub on {source_tokens:.1f} million tokens, was adapted to a balanced
encoder-decoder, the cross-attention copied from the self-attention. Pretraining:
PrefixLM, {steps} steps of 8 rows of 128 + 128 tokens. {twice:,} of the {documents:,}
texts repeat every paragraph, so that the model learns to copy from the encoder.{tuning}

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

A very small model of one kind of English text. It shows the package with real weights
and is not meant to be relied on.
"""
DESCRIPTIONS = {
    "t5gemma_mini": "A small T5Gemma that is pretrained on plain text, to be "
    "fine-tuned.",
    "t5gemma_mini_synopsis": "A small T5Gemma that shortens a Debian package "
    "description to one line.",
}
BASELINES = """The first ten words of the description score ROUGE-L 28.2; a hand-written
rule that strips "X is a" scores ROUGE-L 32.1 and BLEU 9.7."""


def publish(name, run, args, folder):
    """Convert a run's preset to bfloat16, measure it and write its card."""
    output = folder / "presets" / name
    convert(str(run / "preset"), output, dtype="bfloat16", overwrite=True)
    model = kt.Seq2SeqLM.from_preset(output)
    log = json.loads((args.runs / f"sources/{SIZE}/log.json").read_text())
    if name.endswith("synopsis"):
        scores = measure(model, args.data)
    else:
        pretraining = json.loads((folder / "pretrained/scores.json").read_text())
        scores = pretraining["valid"]["loss"]
    write_card(
        output,
        name,
        scores,
        parameters=model.backbone.config.count_params(),
        source_tokens=log[-1]["tokens"] / 1e6,
        steps=args.pretraining_steps,
        epochs=args.epochs,
    )


def measure(model, data):
    """Scores on the synopsis test set by decoding method."""
    test = corpus.read_synopsis(data, "test")
    scores = {}
    for method, options in (("greedy", {}), ("5 beams", {"num_beams": 5})):
        answers = model.generate(test["encoder_text"], **options)
        metrics = ["rouge", "bleu", "chrf"]
        scores[method] = kt.score_texts(answers, test["decoder_text"], metrics)
    return scores


def write_card(folder, name, scores, parameters, source_tokens, steps, epochs):
    """Write README.md of an embedded preset, its metadata included.

    Args:
        folder: of the preset.
        name: of the preset.
        scores: what `measure` returns; of the pretrained preset `{"mean": loss on
            held-out texts, "before": that of the adapted model}`.
        parameters: their number.
        source_tokens: millions of tokens that the decoder-only model was trained on.
        steps: of the pretraining.
        epochs: of the fine-tuning.
    """
    metadata = {"license": "apache-2.0", "language": "en"}
    if name.endswith("synopsis"):
        metadata["pipeline_tag"] = "summarization"
        dataset = "Debian 12 package synopses"
        results = [
            eval_result(
                measure,
                round(score["mean"], 1),
                dataset,
                "test",
                "summarization",
                variant=method,
            )
            for method, measured in scores.items()
            for measure, score in measured.items()
        ]
        tuning = f"\nFine-tuning: {epochs} epochs on 38,471 synopses."
        text = f"{score_table(scores)}\n\n{BASELINES}"
    else:
        dataset = "Debian 12 descriptions and documentation"
        results = [eval_result("loss", round(scores["mean"], 2), dataset, "validation")]
        tuning = ""
        text = (
            "Loss per token of the second halves of 400 held-out texts: "
            f"{scores['mean']:.2f}; before pretraining\n{scores['before']:.2f}."
        )
    body = CARD.format(
        name=name,
        description=DESCRIPTIONS[name],
        parameters=parameters,
        source_tokens=source_tokens,
        steps=steps,
        twice=TWICE,
        documents=ONCE + TWICE,
        tuning=tuning,
        scores=text,
    )
    save_card(folder, card_metadata(name, results, **metadata), body)


def score_table(scores):
    """Markdown table of measures by decoding method, with greedy's standard errors."""
    lines = [f"| synopsis test, 1,780 rows | {' | '.join(scores)} |", "|---|---|---|"]
    for name, greedy in scores["greedy"].items():
        cells = [f"{measured[name]['mean']:.1f}" for measured in scores.values()]
        error = greedy["standard_error"]
        lines.append(f"| {name} (± {error:.1f}) | {' | '.join(cells)} |")
    return "\n".join(lines)


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

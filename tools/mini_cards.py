"""Measure the embedded presets and write their model cards.

    KERAS_BACKEND=torch python tools/mini_cards.py --data DATA [--logs LOGS] \\
        --presets keras_t5gemma/_presets

`LOGS` holds the logs of `tools/train_mini.py`: one folder with `log.json` a stage.
Without them only the scores of the fine-tuned preset's card are written again. With
`--compare PRESET` another preset is measured the same way and printed.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT)]

import corpus  # noqa: E402
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS  # noqa: E402

import keras_t5gemma as kt  # noqa: E402
from keras_t5gemma.recipes.model_card import (  # noqa: E402
    card_metadata,
    eval_result,
    save_card,
)

METHODS = {"greedy": {}, "5 beams": {"num_beams": 5}}
ANY_REPEATS = {"no_repeat_ngram_size": 0, "repetition_penalty": 1.0}
METRICS = ["rouge", "bleu", "chrf"]
SHOWN = 20  # Answers in the card: of every 89th row of the test set.

CARD = """# {name}

{description}

{parameters:,} parameters: six layers of width 192 in the encoder, two in the decoder,
an 8,192-piece vocabulary with Gemma's special ids, weights in bfloat16. It contains no
Gemma weights.

## How it was made

Following the paper (arXiv 2504.06225): two decoder-only Gemma 2, of six and of two
layers, were trained with KerasHub on {source_tokens:.0f} million tokens each and
adapted to an unbalanced encoder-decoder; its cross-attention started at random.
Pretraining: {steps:,} steps of 256 rows of 128 + 128 tokens, 45 % UL2 in T5Gemma 2's
mixture, 40 % PrefixLM, 15 % paragraphs to copy, in two runs of {minutes:.1f} minutes in
all, on JAX in mixed_bfloat16 on one H200.{tuning}

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


def words(text):
    """Lower-case words of a text, without punctuation around them."""
    parts = (word.strip(".,:;()[]\"'`!?*").lower() for word in text.split())
    return [word for word in parts if word]


def repeats(answer):
    """Whether a sequence of three words occurs twice."""
    found = words(answer)
    trigrams = list(zip(found, found[1:], found[2:], strict=False))
    return len(set(trigrams)) < len(trigrams)


def stutters(answer):
    """Whether a word follows itself."""
    found = words(answer)
    return any(a == b for a, b in zip(found, found[1:], strict=False))


SHARES = {"repeated trigram, %": repeats, "word twice in a row, %": stutters}


def unsupported(answers, sources):
    """Percentage of words that are neither in the source nor function words."""
    counts = [0, 0]
    for answer, source in zip(answers, sources, strict=True):
        known = set(words(source)) | ENGLISH_STOP_WORDS
        found = words(answer)
        counts[0] += sum(word not in known for word in found)
        counts[1] += len(found)
    return 100 * counts[0] / max(counts[1], 1)


def measure(preset, data, split="test", rows=None, **defaults):
    """Scores and answers on the synopsis data by decoding method.

    Args:
        preset: name or folder.
        data: folder of the data.
        split: `"test"` or `"valid"`.
        rows: only the first ones.
        **defaults: options of `generate`.
    """
    model = kt.Seq2SeqLM.from_preset(preset)
    pairs = corpus.read_synopsis(data, split)
    sources, targets = (pairs[f"{side}_text"][:rows] for side in ("encoder", "decoder"))
    scores, answers = {}, {}
    for method, options in METHODS.items():
        answers[method] = model.generate(sources, **defaults, **options)
        scores[method] = kt.score_texts(answers[method], targets, METRICS)
        for name, is_so in SHARES.items():
            found = list(map(is_so, answers[method]))
            scores[method][name] = {"mean": 100 * sum(found) / len(found)}
        share = unsupported(answers[method], sources)
        scores[method]["words not in the source, %"] = {"mean": share}
    return scores, answers


def score_table(scores):
    """Markdown table of measures by decoding method, with greedy's standard errors."""
    lines = [f"| synopsis test, 1,780 rows | {' | '.join(scores)} |", "|---|---|---|"]
    for name, greedy in scores["greedy"].items():
        cells = [f"{measured[name]['mean']:.1f}" for measured in scores.values()]
        error = greedy.get("standard_error")
        label = name if error is None else f"{name} (± {error:.1f})"
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def score_section(scores, repeating, shown):
    """The card's section of scores.

    Args:
        scores: what `measure` returns first.
        repeating: the same with `ANY_REPEATS`.
        shown: `(package, answer)` pairs.
    """
    both = (repeating["greedy"], repeating["5 beams"])
    rouge = " and ".join(f"{s['rougeL']['mean']:.1f}" for s in both)
    twice = " and ".join(f"{s['word twice in a row, %']['mean']:.1f} %" for s in both)
    answers = "\n".join(f"- `{package}`: {answer}" for package, answer in shown)
    return f"""{score_table(scores)}

The preset's `generation_config.json` keeps an answer from repeating a pair of tokens
and makes repeated ones less likely (`no_repeat_ngram_size=2`, `repetition_penalty=1.5`,
chosen on the validation set). With 0 and 1.0: ROUGE-L {rouge}, a word twice in a
row in {twice} of the answers.

{BASELINES}

Greedy answers for every {1780 // SHOWN}th package of the test set:

{answers}"""


def score_metadata(scores):
    """The measures for the card's metadata."""
    return [
        eval_result(
            measure,
            round(score["mean"], 1),
            "Debian 12 package synopses",
            "test",
            "summarization",
            variant=method,
        )
        for method, measured in scores.items()
        for measure, score in measured.items()
        if "%" not in measure
    ]


def card_options(tuned):
    """Metadata of both cards."""
    options = {"license": "apache-2.0", "language": "en"}
    return options | ({"pipeline_tag": "summarization"} if tuned else {})


def write_scores(folder, scores, section):
    """Write the scores of an existing card again."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    body = card.split("---\n", 2)[2].lstrip("\n")
    start = body.index("## Scores\n\n") + len("## Scores\n\n")
    body = body[:start] + section + body[body.index("\n\n## Limits") :]
    metadata = card_metadata(folder.name, score_metadata(scores), **card_options(True))
    save_card(folder, metadata, body)


def write_card(folder, scores, logs, section=""):
    """Write README.md of an embedded preset, its metadata included.

    Args:
        folder: of the preset; its name is the preset's.
        scores: what `measure` returns first, for the fine-tuned preset.
        logs: dict of the stages' logs, see `read_logs`.
        section: of the scores, for the fine-tuned preset.
    """
    name = folder.name
    tuned = name.endswith("synopsis")
    tuning = ""
    pretraining, losses = logs["pretrained"], logs["losses"]
    if tuned:
        results, text = score_metadata(scores), section
        steps = " and of ".join(f"{part[-1]['steps']:,}" for part in logs["synopsis"])
        tuning = (
            f"\nFine-tuning: the mean of two, of {steps} steps of {logs['rows']} of "
            "the 38,471\nsynopses."
        )
    else:
        dataset = "Debian 12 descriptions and documentation"
        results = [eval_result("loss", round(losses[1], 2), dataset, "validation")]
        text = (
            "Loss per token of the second halves of held-out texts of 256 tokens: "
            f"{losses[1]:.2f};\nbefore pretraining {losses[0]:.2f}."
        )
    model = kt.Backbone.from_preset(folder)
    body = CARD.format(
        name=name,
        description=DESCRIPTIONS[name],
        parameters=model.config.count_params(),
        source_tokens=logs["source"][-1]["steps"] * 256 * 256 / 1e6,
        steps=sum(part[-1]["steps"] for part in pretraining),
        minutes=sum(part[-1]["seconds"] for part in pretraining) / 60,
        tuning=tuning,
        scores=text,
    )
    save_card(folder, card_metadata(name, results, **card_options(tuned)), body)


def read_logs(folder, rows):
    """Logs of the stages: rounds by stage, and losses before and after pretraining.

    A pretraining in several parts has the folders `pretrained`, `pretrained-2`, ...
    """

    def rounds(path):
        return [entry for entry in json.loads(path.read_text()) if "steps" in entry]

    parts = sorted(folder.glob("pretrained*/log.json"))
    ends = [
        {
            key: value
            for entry in json.loads(path.read_text())
            for key, value in entry.items()
        }
        for path in parts
    ]
    return {
        "source": rounds(folder / "source-6/log.json"),
        "pretrained": [rounds(path) for path in parts],
        "synopsis": [
            rounds(path) for path in sorted(folder.glob("synopsis-*/log.json"))
        ],
        "losses": (ends[0]["before"], ends[-1]["held_out_loss"]),
        "rows": rows,
    }


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--logs", type=Path)
    parser.add_argument("--presets", type=Path, help="folder of both presets")
    parser.add_argument("--compare", help="a preset to measure only")
    parser.add_argument("--rows", type=int, default=128, help="rows of a tuning step")
    args = parser.parse_args()
    if args.compare:
        print(score_table(measure(args.compare, args.data)[0]))
        return
    tuned = args.presets / "t5gemma_mini_synopsis"
    scores, answers = measure(tuned, args.data)
    print(score_table(scores))
    names = corpus.read_synopsis(args.data, "test", names=True)["name"]
    shown = list(zip(names, answers["greedy"], strict=True))[:: len(names) // SHOWN]
    repeating, _ = measure(tuned, args.data, **ANY_REPEATS)
    section = score_section(scores, repeating, shown[:SHOWN])
    if not args.logs:
        write_scores(tuned, scores, section)
        return
    logs = read_logs(args.logs, args.rows)
    write_card(tuned, scores, logs, section)
    write_card(args.presets / "t5gemma_mini", None, logs)


if __name__ == "__main__":
    main()

"""Tables and figures of the experiment, from the results of its runs.

    python experiments/report.py

Reads `experiments/results/*.json`, writes `experiments/*.png`, and puts the tables
between their markers in `experiments/README.md`. Missing runs are left out.
"""

import functools
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path

import representation_table as cells
from grid import FULL_SIZES, LONGER, STEPS

HERE = Path(__file__).parent
README = HERE / "README.md"
NAMES = {
    "prefixlm": "adapted, PrefixLM",
    "scratch": "from scratch, PrefixLM",
    "ul2": "adapted, UL2",
    "ul2-scratch": "from scratch, UL2",
    "distilled": "adapted, PrefixLM, distilled",
    "copying-teacher": "adapted, PrefixLM, distilled from a model that copies",
    "random-cross": "adapted, random cross-attention",
    "causal": "adapted, causal encoder",
}
FULL_PAIRS = (
    "shallow-shallow",
    "deep-shallow",
    "deep-deep",
    "twice-twice",
    "thrice-thrice",
)
# Rows of the table of `full`: label, run before fine-tuning, run of fine-tuning.
FULL = [
    (f"decoder-only, {size}", f"decoder-only/{size}", f"decoder-only/{size}")
    for size in FULL_SIZES
] + [
    (f"{pair}, {label}", f"pretrain/{pair}/{variant}", f"synopsis/{pair}/{variant}")
    for pair in FULL_PAIRS
    for variant, label in NAMES.items()
]


def read_results():
    """`{name of a run: results}`."""
    results = {}
    for path in sorted((HERE / "results").glob("*.json")):
        if path.name.startswith(cells.PREFIX):
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        results[result["run"]["name"]] = result
    return results


def by_variant(results, kind, pair=None):
    """`{(pair, variant): results of its seeds}`."""
    groups = defaultdict(list)
    for name, result in results.items():
        parts = name.split("/")
        if parts[0] == kind and len(parts) == 4 and pair in (None, parts[1]):
            groups[parts[1], parts[2]].append(result)
    return groups


def spread(values, digits=2):
    """Mean ± standard deviation over seeds, as text."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.{digits}f} (one seed)"
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def rouge(result):
    """ROUGE-L of a run."""
    return result["scores"]["rougeL"]["mean"]


def table(header, rows):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def pretraining(results, pair="small-small"):
    """Held-out loss before, after a tenth and at the end; copy accuracy."""
    groups = by_variant(results, "pretrain", pair)
    rows = []
    for variant in NAMES:
        runs = groups.get((pair, variant))
        if not runs:
            continue
        start = runs[0]["scores"]["valid"]["loss"]["before"]
        tenth = spread([run["log"][0]["val_loss"] for run in runs])
        end = spread([run["log"][-1]["val_loss"] for run in runs])
        rows.append([NAMES[variant], f"{start:.2f}", tenth, end, copied(runs)])
    header = ["", "before", "after a tenth", "end", "copy accuracy, %"]
    return table(header, rows)


def copied(runs):
    """Token accuracy on repeated paragraphs, in percent."""
    return spread([100 * run["copied"]["accuracy"] for run in runs], 0)


def tuning(results):
    """The same models after fine-tuning on synopses."""
    groups = by_variant(results, "synopsis", "small-small")
    rows = []
    for variant in NAMES:
        if runs := groups.get(("small-small", variant)):
            losses = spread([run["val_loss"] for run in runs], 3)
            scores = spread([rouge(run) for run in runs], 1)
            rows.append([NAMES[variant], losses, scores])
    if decoders := of_kind(results, "decoder-only/small"):
        losses = spread([run["val_loss"] for run in decoders], 3)
        row = ["the decoder-only source", losses]
        rows.append([*row, spread([rouge(run) for run in decoders], 1)])
    return table(["", "validation loss", "ROUGE-L"], rows)


def of_kind(results, kind):
    """Results of the seeds of `kind`, a name without the seed."""
    return [r for name, r in results.items() if name.rpartition("/")[0] == kind]


def longer(results):
    """Copying and quality by steps of pretraining, small-small and its source."""
    rows = []
    for suffix, times in (("", 1), ("-long", LONGER)):
        pairs = f"small-small/prefixlm{suffix}"
        for label, before, after in (
            ("encoder-decoder", f"pretrain/{pairs}", f"synopsis/{pairs}"),
            (
                "decoder-only",
                "decoder-only/small-long" if suffix else "copying/small",
                f"decoder-only/small{suffix}",
            ),
        ):
            trained, tuned = of_kind(results, before), of_kind(results, after)
            if trained and tuned:
                losses = spread([run["val_loss"] for run in tuned], 3)
                scores = spread([rouge(run) for run in tuned], 1)
                rows.append([times * STEPS, label, copied(trained), losses, scores])
    header = ["steps", "", "copy accuracy, %", "validation loss", "ROUGE-L"]
    return table(header, rows)


def sizes(results):
    """Cost and quality of balanced and unbalanced pairs and of their sources."""
    rows = []
    for label, runs in _of_sizes(results):
        rows.append(
            [
                label,
                f"{runs[0]['flops']:.0f}",
                f"{milliseconds(runs):.1f}",
                spread([run["val_loss"] for run in runs], 3),
                spread([rouge(run) for run in runs], 1),
            ]
        )
    header = ["", "MFLOPs per answer", "ms per answer", "validation loss", "ROUGE-L"]
    return table(header, rows)


def full(results):
    """Pairs and sources of all texts, after `LONGER` times the steps."""
    rows = []
    for label, before, after in FULL:
        trained, tuned = of_kind(results, before), of_kind(results, after)
        if not trained or not tuned:
            continue
        rows.append(
            [
                label,
                f"{tuned[0]['flops']:.0f}",
                f"{milliseconds(tuned):.1f}",
                copied(trained),
                spread([run["val_loss"] for run in tuned], 3),
                spread([rouge(run) for run in tuned], 1),
            ]
        )
    header = ["", "MFLOPs per answer", "ms per answer", "copy accuracy, %"]
    return table([*header, "validation loss", "ROUGE-L"], rows)


def draw_sources(results):
    """Losses of the sources that were trained on all texts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    panel = figure.subplots()
    for i, size in enumerate(FULL_SIZES):
        if result := results.get(f"source/{size}"):
            start = results.get(f"source/{result['run'].get('start')}")
            before = start["log"][-1]["tokens"] if start else 0
            x = [(before + entry["tokens"]) / 1e6 for entry in result["log"]]
            for key, style in (("held_out_loss", "-"), ("loss", ":")):
                y = [entry[key] for entry in result["log"]]
                label = size if key == "held_out_loss" else None
                panel.plot(x, y, style, color=f"C{i}", label=label, linewidth=1)
    panel.set(
        xlabel="million tokens",
        ylabel="loss; held-out, and of training (dotted)",
        ylim=(4, 6),
    )
    panel.grid(alpha=0.3)
    _legend(panel)
    figure.savefig(HERE / "sources.png", dpi=120)


def milliseconds(runs):
    """Latency of an answer: the least of the seeds, which is disturbed least."""
    return min(run["milliseconds"] for run in runs)


def _of_sizes(results):
    for size in ("small", "medium", "large"):
        if runs := of_kind(results, f"decoder-only/{size}"):
            yield f"decoder-only, {size}", runs
    groups = by_variant(results, "synopsis")
    for pair in ("small-small", "large-small", "medium-medium", "large-large"):
        if runs := groups.get((pair, "prefixlm")):
            yield f"encoder-decoder, {pair}", runs


def warm_up(results):
    """Loss by steps that train cross-attention alone, large encoder, small decoder."""
    groups = by_variant(results, "pretrain", "large-small")
    rows = []
    for steps in (0, 50, 200):
        if runs := groups.get(("large-small", f"warm-up-{steps}")):
            losses = spread([run["log"][-1]["val_loss"] for run in runs], 3)
            rows.append([steps, losses, copied(runs)])
    return table(["steps of 500", "final loss", "copy accuracy, %"], rows)


def draw_losses(results):
    """Loss by tokens seen, adapted and from scratch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    groups = by_variant(results, "pretrain", "small-small")
    for panel, title, variants in (
        (panels[0], "PrefixLM", ("prefixlm", "distilled", "scratch")),
        (panels[1], "UL2", ("ul2", "ul2-scratch")),
    ):
        for variant in variants:
            for i, run in enumerate(groups.get(("small-small", variant), ())):
                x = [row["tokens"] / 1e6 for row in run["log"]]
                y = [row["val_loss"] for row in run["log"]]
                color = f"C{list(NAMES).index(variant)}"
                label = None if i else NAMES[variant]
                panel.plot(x, y, color=color, label=label, linewidth=1)
        panel.set(title=title, xlabel="million tokens")
        panel.grid(alpha=0.3)
        _legend(panel)
    panels[0].set_ylabel("loss on held-out text")
    figure.savefig(HERE / "losses.png", dpi=120)


def draw_frontier(results):
    """Quality by cost, after 500 steps (hollow) and from sources of all texts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    kinds = {"decoder-only": ("s", "C0"), "encoder-decoder": ("o", "C1")}
    long = [
        (label.replace(", adapted, PrefixLM", ""), of_kind(results, tuned))
        for label, _, tuned in FULL
        if (tuned.startswith("decoder-only") or tuned.endswith("/prefixlm"))
        and "twice" not in label  # Shallow again, timed on another machine.
    ]
    for panel, cost, unit in (
        (panels[0], "flops", "MFLOPs per answer"),
        (panels[1], "milliseconds", "milliseconds per answer"),
    ):
        for found, steps in ((_of_sizes(results), STEPS), (long, LONGER * STEPS)):
            for label, runs in found:
                if not runs:
                    continue
                kind = "decoder-only" if "decoder-only" in label else "encoder-decoder"
                marker, color = kinds[kind]
                x = milliseconds(runs) if cost == "milliseconds" else runs[0][cost]
                y = statistics.fmean(map(rouge, runs))
                panel.errorbar(
                    x,
                    y,
                    _rouge_error(runs),
                    fmt=marker,
                    color=color,
                    fillstyle="none" if steps == STEPS else "full",
                    capsize=3,
                    label=f"{kind}, {steps:,} steps",
                )
                panel.annotate(
                    label.split(", ")[-1],
                    (x, y),
                    # Points of both kinds may overlap.
                    (6, -11 if kind == "decoder-only" else 5),
                    textcoords="offset points",
                    fontsize=7,
                )
        panel.set(xlabel=unit)
        panel.margins(x=0.2)
        panel.grid(alpha=0.3)
    handles, labels = panels[1].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    panels[1].legend(unique.values(), unique, fontsize=7, loc="lower right")
    panels[0].set_ylabel("ROUGE-L on synopsis")
    figure.savefig(HERE / "frontier.png", dpi=120)


def _rouge_error(runs):
    """Standard error over test rows, and over seeds where there are several."""
    rows = statistics.fmean(r["scores"]["rougeL"]["standard_error"] for r in runs)
    if len(runs) == 1:
        return rows
    seeds = statistics.variance(map(rouge, runs)) / len(runs)
    return (rows**2 + seeds) ** 0.5


def representation(_):
    """Accuracies of encoders and their sources on classification tasks."""
    header, *rows = cells.rows_of_table(cells.read_cells())
    return table(header, rows)


def _legend(panel):
    if panel.get_legend_handles_labels()[0]:
        panel.legend()


TABLES = {
    "pretraining": pretraining,
    "pretraining-full": functools.partial(pretraining, pair="shallow-shallow"),
    "tuning": tuning,
    "sizes": sizes,
    "longer": longer,
    "full": full,
    "warm-up": warm_up,
    "representation": representation,
}


def main():
    """Write all tables and figures."""
    results = read_results()
    text = README.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        mark = f"<!-- {name} -->"
        pattern = rf"{mark}\n.*?{mark}"
        assert re.search(pattern, text, re.S), mark
        new = f"{mark}\n{make(results)}\n{mark}"
        text = re.sub(pattern, lambda _, new=new: new, text, flags=re.S)
    README.write_text(text, encoding="utf-8")
    draw_losses(results)
    draw_frontier(results)
    draw_sources(results)
    cells.draw(cells.read_cells())
    seconds = sum(result.get("seconds", 0) for result in results.values())
    print(f"{len(results)} runs, {seconds / 3600:.1f} hours")


if __name__ == "__main__":
    main()

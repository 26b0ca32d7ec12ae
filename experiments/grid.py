"""The grid of runs, in the order in which `run.py` makes them.

Names: `pretrain/PAIR/VARIANT/SEED`, `synopsis/PAIR/VARIANT/SEED`,
`decoder-only/SIZE/SEED`, `copying/SIZE/SEED`. In runs of the first three sizes with
`LONGER` times the steps, VARIANT or SIZE ends in `-long`.
"""

import dataclasses

SIZES = ("small", "medium", "large")
# Trained on all texts; their runs have `LONGER` times the steps.
FULL_SIZES = ("shallow", "deep", "twice", "thrice")
# name: (encoder size, decoder size)
PAIRS = {
    "small-small": ("small", "small"),
    "medium-medium": ("medium", "medium"),
    "large-large": ("large", "large"),
    "large-small": ("large", "small"),
    "shallow-shallow": ("shallow", "shallow"),
    "deep-shallow": ("deep", "shallow"),
    "deep-deep": ("deep", "deep"),
    "twice-twice": ("twice", "twice"),
    "thrice-thrice": ("thrice", "thrice"),
}
STEPS = 500  # Of continued pretraining, each 8 rows of 128 + 128 tokens.
ROWS = 6_000  # Fine-tuning pairs, one epoch.
SEEDS = (0, 1, 2)
LONGER = 4  # Times the steps, and texts, of the other runs.
# Appended to the size of a teacher: one that was trained as the decoder-only models
# that are fine-tuned, and has learned to copy.
COPYING = "-copying"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        name: see above; it also names the file of results.
        kind: `"pretrain"`, `"synopsis"`, `"decoder-only"`, or `"copying"` of a
            decoder-only model.
        pair: of `PAIRS`, or a size.
        start: initial weights: `"adapted"`, `"scratch"`, `"random-cross"`, or the name
            of a run to continue.
        seed: of the training.
        options: of `pretrain`.
        causal_encoder: use causal attention in the encoder.
        times: pretraining has `STEPS` times this.
    """

    name: str
    kind: str
    pair: str
    start: str = "adapted"
    seed: int = 0
    options: dict = dataclasses.field(default_factory=dict)
    causal_encoder: bool = False
    times: int = 1


def sources_of(run):
    """Sizes of the decoder-only models that a run starts from or distills."""
    sizes = set(PAIRS.get(run.pair, (run.pair,)))
    if "teacher" in run.options:
        sizes.add(run.options["teacher"].removesuffix(COPYING))
    return sorted(sizes)


def _pretrain(pair, variant, seed, start="adapted", causal=False, times=1, **options):
    name = f"pretrain/{pair}/{variant}/{seed}"
    return Run(name, "pretrain", pair, start, seed, options, causal, times)


def _synopsis(before):
    _, pair, variant, seed = before.name.split("/")
    name = f"synopsis/{pair}/{variant}/{seed}"
    return Run(
        name, "synopsis", pair, before.name, int(seed), {}, before.causal_encoder
    )


def make_grid():
    """All runs, the cheap and informative ones first."""
    runs = []

    def add(run, tuned=True):
        runs.append(run)
        if tuned:
            runs.append(_synopsis(run))

    def small_pairs(seed):
        # a: adapted or from scratch; f: objectives and distillation.
        add(_pretrain("small-small", "prefixlm", seed))
        add(_pretrain("small-small", "scratch", seed, "scratch"))
        # e: initialization and attention of the pair.
        add(_pretrain("small-small", "random-cross", seed, "random-cross"))
        add(_pretrain("small-small", "causal", seed, causal=True))
        add(_pretrain("small-small", "ul2", seed, objective="t5gemma2"))
        ul2_scratch = _pretrain(
            "small-small", "ul2-scratch", seed, "scratch", objective="t5gemma2"
        )
        add(ul2_scratch, tuned=False)
        add(_pretrain("small-small", "distilled", seed, teacher="large", top_k=64))
        runs.append(
            Run(f"decoder-only/small/{seed}", "decoder-only", "small", seed=seed)
        )

    small_pairs(0)
    # b, c: sizes and unequal pairs, against their decoder-only sources.
    add(_pretrain("large-small", "prefixlm", 0))
    add(_pretrain("large-large", "prefixlm", 0))
    runs.append(Run("decoder-only/large/0", "decoder-only", "large"))
    small_pairs(1)
    small_pairs(2)
    # d: steps that train cross-attention alone; `pretrain` takes 51 by default.
    for seed in SEEDS:
        for steps in (0, 50, 200):
            options = {"cross_attention_steps": steps}
            name = f"warm-up-{steps}"
            run = _pretrain("large-small", name, seed, **options)
            add(run, tuned=False)
    add(_pretrain("medium-medium", "prefixlm", 0))
    runs.append(Run("decoder-only/medium/0", "decoder-only", "medium"))
    for seed in SEEDS[1:]:
        for size in ("medium", "large"):
            add(_pretrain(f"{size}-{size}", "prefixlm", seed))
            name = f"decoder-only/{size}/{seed}"
            runs.append(Run(name, "decoder-only", size, seed=seed))
        add(_pretrain("large-small", "prefixlm", seed))
    # b: when both have learned to copy.
    for seed in SEEDS:
        add(_pretrain("small-small", "prefixlm-long", seed, times=LONGER))
        name = f"decoder-only/small-long/{seed}"
        runs.append(Run(name, "decoder-only", "small", seed=seed, times=LONGER))
        runs.append(Run(f"copying/small/{seed}", "copying", "small", seed=seed))
    return [*runs, *full_grid()]


def full_grid():
    """Runs from the sources of all texts, with `LONGER` times the steps."""
    runs = []

    def add(pair, variant, seed, start="adapted", **options):
        run = _pretrain(pair, variant, seed, start, times=LONGER, **options)
        runs.extend((run, _synopsis(run)))

    def decoder_only(size, seed):
        name = f"decoder-only/{size}/{seed}"
        runs.append(Run(name, "decoder-only", size, seed=seed, times=LONGER))

    # b, c: equal and unequal pairs against their sources.
    for seed in SEEDS:
        for pair in ("shallow-shallow", "deep-shallow"):
            add(pair, "prefixlm", seed)
        for size in ("shallow", "deep"):
            decoder_only(size, seed)
    # a, e, f: the variants of the first grid.
    for seed in SEEDS:
        add("shallow-shallow", "scratch", seed, "scratch")
        add("shallow-shallow", "random-cross", seed, "random-cross")
        add("shallow-shallow", "causal", seed, causal=True)
        add("shallow-shallow", "ul2", seed, objective="t5gemma2")
        add("shallow-shallow", "distilled", seed, teacher="deep", top_k=64)
        add("deep-deep", "prefixlm", seed)
        # f: a teacher that has learned to copy.
        options = {"teacher": "deep" + COPYING, "top_k": 64}
        add("shallow-shallow", "copying-teacher", seed, **options)
    # b: from a second source of the shallow shape, with twice the training, and more.
    for seed in SEEDS:
        add("twice-twice", "prefixlm", seed)
        decoder_only("twice", seed)
    for seed in SEEDS:
        add("thrice-thrice", "prefixlm", seed)
        decoder_only("thrice", seed)
    return runs

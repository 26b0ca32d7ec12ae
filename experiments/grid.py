"""The runs of the experiment, in the order in which they are made.

Every run is a name and what `run.py` does for it. Names say what is compared:
`pretrain/PAIR/VARIANT/SEED`, `synopsis/PAIR/VARIANT/SEED`, `decoder-only/SIZE/SEED`.
"""

import dataclasses

SIZES = ("small", "medium", "large")
# Pairs: who reads, who writes.
PAIRS = {
    "small-small": ("small", "small"),
    "medium-medium": ("medium", "medium"),
    "large-large": ("large", "large"),
    "large-small": ("large", "small"),
}
STEPS = 500  # Of a continued pretraining; a step is 8 rows of 128 + 128 tokens.
ROWS = 6_000  # Of the synopsis training, in one epoch.
SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        name: see above; also the file of its results.
        kind: `"pretrain"`, `"synopsis"` or `"decoder-only"`.
        pair: of `PAIRS`, or a size.
        start: what the weights are: `"adapted"`, `"scratch"`, `"random-cross"`, or the
            name of a run.
        seed: of the training.
        options: of `pretrain`.
        causal_encoder: the encoder sees to the left only.
    """

    name: str
    kind: str
    pair: str
    start: str = "adapted"
    seed: int = 0
    options: dict = dataclasses.field(default_factory=dict)
    causal_encoder: bool = False


def sources_of(run):
    """The sizes of the decoder-only models that a run begins with or learns from."""
    sizes = set(PAIRS.get(run.pair, (run.pair,)))
    return sorted(sizes | {run.options[n] for n in ("teacher",) if n in run.options})


def _pretrain(pair, variant, seed, start="adapted", causal=False, **options):
    name = f"pretrain/{pair}/{variant}/{seed}"
    return Run(name, "pretrain", pair, start, seed, options, causal)


def _synopsis(before):
    _, pair, variant, seed = before.name.split("/")
    name = f"synopsis/{pair}/{variant}/{seed}"
    return Run(
        name, "synopsis", pair, before.name, int(seed), {}, before.causal_encoder
    )


def make_plan():
    """All runs, the cheap and telling ones first."""
    plan = []

    def add(*runs, tuned=True):
        for run in runs:
            plan.append(run)
            if tuned:
                plan.append(_synopsis(run))

    def small_pairs(seed):
        # a: adapted or from scratch; f: objectives and distillation.
        add(_pretrain("small-small", "prefixlm", seed))
        add(_pretrain("small-small", "scratch", seed, "scratch"))
        # e: how the pair begins.
        add(_pretrain("small-small", "random-cross", seed, "random-cross"))
        add(_pretrain("small-small", "causal", seed, causal=True))
        add(_pretrain("small-small", "ul2", seed, objective="t5gemma2"))
        ul2_scratch = _pretrain(
            "small-small", "ul2-scratch", seed, "scratch", objective="t5gemma2"
        )
        add(ul2_scratch, tuned=False)
        add(_pretrain("small-small", "distilled", seed, teacher="large", top_k=64))
        plan.append(
            Run(f"decoder-only/small/{seed}", "decoder-only", "small", seed=seed)
        )

    small_pairs(0)
    # b, c: sizes and unequal pairs, against their decoder-only sources.
    add(_pretrain("large-small", "prefixlm", 0))
    add(_pretrain("large-large", "prefixlm", 0))
    plan.append(Run("decoder-only/large/0", "decoder-only", "large"))
    small_pairs(1)
    small_pairs(2)
    # d: the cross-attention alone first. By itself `pretrain` takes 51 steps.
    for seed in SEEDS:
        for steps in (0, 50, 200):
            options = {"cross_attention_steps": steps}
            name = f"warm-up-{steps}"
            run = _pretrain("large-small", name, seed, **options)
            add(run, tuned=False)
    add(_pretrain("medium-medium", "prefixlm", 0))
    plan.append(Run("decoder-only/medium/0", "decoder-only", "medium"))
    return plan

"""Tables that are computed in the build: by the planner, or read from other pages."""

import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CARDS = (8, 12, 16, 24, 40, 80)  # GB.
SHARE = 0.85  # Of a card; the rest is room for what a plan does not count.
LENGTH = (512, 128)  # Tokens of encoder and decoder.
BATCHES = (64, 32, 16, 8, 4, 2, 1)
GENERATED_ROWS = 8
# In order of preference.
DTYPES = {"bfloat16": None, "int8": "int8"}
LORA = {
    "mixed_bfloat16": {"dtype": "mixed_bfloat16", "lora_rank": 16},
    "bfloat16": {"dtype": "bfloat16", "lora_rank": 16},
    "bfloat16 on int8": {"dtype": "bfloat16", "lora_rank": 16, "quantize": "int8"},
}
FULL = {
    "mixed_bfloat16, AdamW": {"dtype": "mixed_bfloat16", "optimizer": "adamw"},
    "mixed_bfloat16, Lion": {"dtype": "mixed_bfloat16", "optimizer": "lion"},
    "bfloat16, AdamW": {"dtype": "bfloat16", "optimizer": "adamw"},
    "bfloat16, Adafactor": {"dtype": "bfloat16", "optimizer": "adafactor"},
}


def table(header, rows):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in lines)


@functools.cache
def pairs():
    """`{pair: config}` of the published sizes, smallest first."""
    import keras_t5gemma

    names = [row.name for row in keras_t5gemma.presets() if "_prefixlm_it" in row.name]
    found = {}
    for name in names:
        sizes = name.removesuffix("_prefixlm_it").removeprefix("t5gemma_").split("_")
        found["-".join(sizes)] = keras_t5gemma.T5GemmaConfig.pair(*sizes)
    return found


def preset_name(pair):
    """The instruction-tuned PrefixLM preset of a pair, e.g. of `"b-b"`."""
    return f"t5gemma_{pair.replace('-', '_')}_prefixlm_it"


def label(pair):
    """A pair as the papers write it."""
    return pair.upper()


def embedded_presets():
    """The presets inside the package."""
    import keras_t5gemma

    rows = [
        (f"`{row.name}`", f"{row.parameters / 1e6:.1f} million", row.description)
        for row in keras_t5gemma.presets()
        if "://" not in row.sources[0]
    ]
    return table(("name", "parameters", "what it is"), rows)


def published_presets():
    """Sizes of the published presets, and bytes of their weights."""
    import keras_t5gemma

    names = [row.name for row in keras_t5gemma.presets()]
    rows = []
    for pair, config in pairs().items():
        part = config.count_params_by_part()
        encoder = sum(n for name, n in part.items() if name.startswith("encoder"))
        stem = f"t5gemma_{pair.replace('-', '_')}_"
        found = [name.removeprefix(stem) for name in names if name.startswith(stem)]
        rows.append(
            (
                f"`{stem}…`",
                f"{config.count_params() / 1e9:.2f}",
                f"{encoder / 1e9:.2f}",
                f"{config.count_params() * 2 / 1e9:.1f}",
                ", ".join(f"`{ending}`" for ending in found),
            )
        )
    header = ("name", "parameters, 10⁹", "of the encoder", "GB in bfloat16", "endings")
    return table(header, rows)


@functools.cache
def training(pair, batch, devices=1, **options):
    """The plan of a training step with rematerialization."""
    import keras_t5gemma

    config = pairs()[pair]
    return keras_t5gemma.plan(config, devices, "80GB", batch, LENGTH, **options)


@functools.cache
def generation_bytes(pair, quantize):
    """Weights, and caches of eight rows."""
    from keras_t5gemma.planning.abstract_variables import model_variables

    weights = model_variables(pairs()[pair], "bfloat16", None, quantize)
    caches = training(pair, GENERATED_ROWS, dtype="bfloat16", lora_rank=1).caches
    return sum(variable.nbytes for variable in weights) + caches


def best_training(pair, memory, choices):
    """`(words, batch, options)` of the first choice that fits, or `None`."""
    for words, options in choices.items():
        for batch in BATCHES:
            if training(pair, batch, **options).total <= SHARE * memory:
                return words, batch, options
    return None


def memory_tabs():
    """For each size of card a table of pairs, and code for the largest with LoRA."""
    text = []
    for card in CARDS:
        rows, largest = [], None
        for pair in pairs():
            reads = [
                words
                for words, quantize in DTYPES.items()
                if generation_bytes(pair, quantize) <= SHARE * card * 1e9
            ]
            lora = best_training(pair, card * 1e9, LORA)
            full = best_training(pair, card * 1e9, FULL)
            largest = (pair, lora) if lora else largest
            if reads:
                cells = [f"{f[0]}, batch {f[1]}" if f else "–" for f in (lora, full)]
                rows.append((label(pair), reads[0], *cells))
        header = ("pair", "generate", "LoRA of rank 16", "all weights")
        body = [table(header, rows), "", *code(card, *largest)]
        text += [f'=== "{card} GB"', "", *(f"    {line}" for line in lines(body)), ""]
    return "\n".join(text)


def lines(parts):
    """Lines of several texts."""
    return "\n".join(parts).split("\n")


def code(card, pair, lora):
    """The largest pair that LoRA can train on a card, as a program."""
    words, batch, options = lora
    quantize = ['model.quantize("int8")'] if options.get("quantize") else []
    return [
        f"The largest pair for {card} GB, {label(pair)}, with {words}:",
        "",
        "```python",
        "model = keras_t5gemma.Seq2SeqLM.from_preset(",
        f'    "{preset_name(pair)}", dtype="{options["dtype"]}"',
        ")",
        *quantize,
        "model.enable_lora(16)",
        "optimizer = keras.optimizers.AdamW(2e-4, beta_2=0.98, global_clipnorm=1.0)",
        "model.compile(optimizer=optimizer, rematerialize=True)",
        f"model.fit(pairs, batch_size={batch})",
        "```",
    ]


def devices_table():
    """Layouts of training all weights on several devices of 80 GB."""
    rows = []
    for pair in ("2b-2b", "9b-2b", "9b-9b"):
        for devices in (4, 8, 16, 64):
            found = training(pair, 8 * devices, devices)
            mesh = f"{found.mesh['data']} x {found.mesh['model']}"
            total = f"{found.total / 1e9:.0f} GB" + ("" if found.fits else ", too much")
            received = f"{found.received / 1e9:.1f} GB"
            rows.append((label(pair), devices, found.strategy, mesh, total, received))
    header = ("pair", "devices", "strategy", "data x model")
    return table((*header, "memory of each", "received per step"), rows)


def readme(title):
    """A section of the README, to the paragraph after its first code block."""
    text = (ROOT / "README.md").read_text("utf-8")
    titles = re.findall(r"^## (.*)$", text, re.M)
    body = re.split(r"^## .*\n", text, flags=re.M)[1 + titles.index(title)]
    body = re.sub(r"\]\((?!\w+:|#)", "](../", body)  # Seen from `docs/`.
    before, code, after = re.split(
        r"^(```.*?^```\n)", body, maxsplit=1, flags=re.M | re.S
    )
    return before + code + after.partition("\n\n")[0] + "\n"


def measured(section, *columns):
    """The first table of a section of benchmarks/RESULTS.md that has all columns.

    Args:
        section: its title, without the date.
        columns: those to show.
    """
    text = (ROOT / "benchmarks/RESULTS.md").read_text("utf-8")
    for part in re.split(r"^## ", text, flags=re.M)[1:]:
        heading, _, body = part.partition("\n")
        date, _, title = heading.partition(", ")
        if title != section:
            continue
        for header, rows in tables_in(body):
            if set(columns) <= set(header):
                places = [header.index(column) for column in columns]
                shown = [[row[i] for i in places] for row in rows]
                anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
                link = f"[Measured {date}: {title}](benchmarks.md#{anchor})"
                return f"{link}\n\n{table(columns, shown)}"
    raise ValueError(f"no table of {section!r} in RESULTS.md has {columns}")


def tables_in(text):
    """`(header, rows)` of each Markdown table."""
    for block in re.findall(r"(?:^\|.*\|\n)+", text + "\n", flags=re.M):
        rows = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]
            for line in block.strip().split("\n")
        ]
        yield rows[0], rows[2:]


TABLES = {
    "embedded presets": embedded_presets,
    "published presets": published_presets,
    "memory": memory_tabs,
    "devices": devices_table,
    "readme": readme,
    "measured": measured,
}


def fill(text):
    """Markdown with `<!-- table: NAME; argument; ... -->` replaced by tables."""

    def replace(match):
        name, *arguments = [part.strip() for part in match.group(1).split(";")]
        return TABLES[name](*arguments)

    return re.sub(r"^<!-- table: (.*?) -->$", replace, text, flags=re.M)

"""Measure whether resident memory grows with calls of generate, fit and from_preset.

    KERAS_BACKEND=jax python tools/measure_memory.py

The slope is fitted by least squares to the resident size after each call, without the
calls of the warm-up, in which programs are compiled and allocators reach their size.
"""

import dataclasses
import gc
import os
import platform
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import keras
import numpy as np
import tyro

import keras_t5gemma as kt

WORDS = "a tool that reads and writes tables of numbers in the plain old kind".split()
SOURCE_WORDS, TARGET_WORDS = 60, 12


@dataclasses.dataclass
class Options:
    """What is measured."""

    dtype: str | None = None
    """Data type of the model, e.g. mixed_bfloat16; None is Keras's default."""
    preset: str = "t5gemma_mini"
    """Preset to load, small enough for many cycles."""
    generate: int = 500
    """Calls of `generate` with one to four sources of random lengths."""
    banned: int = 1000
    """Calls of `generate` with a different `banned_token_ids` each."""
    fit: int = 50
    """Calls of `fit` on pairs of random lengths, padded to one shape."""
    load: int = 200
    """Cycles of `from_preset` and dropping the model."""
    use: int = 20
    """The same with one `generate`, which JAX and TensorFlow compile every time."""
    warm_up: float = 0.3
    """Share of the calls, at their start, that is left out of the slope."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Resident sizes of one kind of call."""

    name: str
    sizes: list[int]
    seconds: float
    warm_up: float

    def row(self) -> str:
        """Row of the Markdown table."""
        first = int(len(self.sizes) * self.warm_up)
        kept = np.array(self.sizes[first:]) / 1e3
        slope = np.polyfit(np.arange(len(kept)), kept, 1)[0] if len(kept) > 1 else 0.0
        cells = [
            keras.config.backend(),
            self.name,
            str(len(self.sizes)),
            f"{self.sizes[0] / 1e6:.0f}",
            f"{kept[0] / 1e3:.0f}",
            f"{kept[-1] / 1e3:.0f}",
            f"{slope:+.1f}",
            f"{self.seconds:.0f}",
        ]
        return f"| {' | '.join(cells)} |"


HEAD = """\
| backend | calls | number | MB first | MB warm | MB last | kB a call | s |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def resident() -> int:
    """Bytes of this process in memory."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def measure(
    name: str, call: Callable[[], object], count: int, warm_up: float
) -> Measurement:
    """Call a function and take the resident size after each call."""
    start, sizes = time.perf_counter(), []
    for _ in range(count):
        call()
        gc.collect()
        sizes.append(resident())
    return Measurement(name, sizes, time.perf_counter() - start, warm_up)


def texts(rng: random.Random, count: int, words: int) -> list[str]:
    """Random texts of one to `words` words."""
    sizes = [rng.randint(1, words) for _ in range(count)]
    return [" ".join(rng.choices(WORDS, k=size)) for size in sizes]


def measurements(o: Options) -> Iterable[Measurement]:
    """All kinds of calls, one after the other."""
    rng = random.Random(0)

    models: list[kt.Seq2SeqLM] = []

    def load() -> None:
        models[:] = [kt.Seq2SeqLM.from_preset(o.preset, dtype=o.dtype)]

    def load_and_use() -> None:
        load()
        models[0].generate("a tool", max_length=4)
        models.clear()

    load()

    longest = [" ".join(["documentation"] * n) for n in (SOURCE_WORDS, TARGET_WORDS)]

    def generate() -> None:
        sources = texts(rng, rng.randint(1, 4), SOURCE_WORDS)
        models[0].generate(sources, max_length=rng.randint(2, 24))

    def fit() -> None:
        count = rng.randint(1, 12)
        # The longest ones give all calls one shape.
        sources = [longest[0], *texts(rng, count, SOURCE_WORDS)]
        targets = [longest[1], *texts(rng, count, TARGET_WORDS)]
        models[0].fit(sources, targets, batch_size=4, verbose=0)

    def ban() -> None:
        ids = rng.sample(range(10, 1000), rng.randint(1, 20))
        models[0].generate("a tool", max_length=16, banned_token_ids=ids)

    if o.generate:
        yield measure("generate", generate, o.generate, o.warm_up)
    if o.banned:
        yield measure("generate, banned ids", ban, o.banned, o.warm_up)
    if o.fit:
        yield measure("fit", fit, o.fit, o.warm_up)
    if o.load:
        yield measure("load, unload", load, o.load, o.warm_up)
    if o.use:
        yield measure("load, generate, unload", load_and_use, o.use, o.warm_up)


def main() -> None:
    o = tyro.cli(Options, description=__doc__)
    print(f"{platform.machine()}, {os.cpu_count()} cores, keras {keras.__version__}")
    print(HEAD)
    for measurement in measurements(o):
        print(measurement.row(), flush=True)


if __name__ == "__main__":
    main()

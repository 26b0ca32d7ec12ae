"""Training planner: memory and communication per device, and the layout that fits."""

import dataclasses
import math
import os
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import keras

from keras_t5gemma.checkpoints import catalog
from keras_t5gemma.config import T5GemmaConfig
from keras_t5gemma.distribution.layouts import STRATEGIES, check_mesh
from keras_t5gemma.planning.costs import Job, Plan, evaluate
from keras_t5gemma.planning.options import PlanOptions
from keras_t5gemma.training.optimizers import OPTIMIZERS
from keras_t5gemma.utils.checks import one_of, shown, whole_number
from keras_t5gemma.utils.options import takes_options

UNITS = {"": 1, "B": 1} | {
    f"{letter}{infix}B": base ** (i + 1)
    for infix, base in (("", 1000), ("i", 1024))
    for i, letter in enumerate("KMGT")
}
MAX_ADVISED_DEVICES = 4096


@takes_options(PlanOptions)
def plan(o: PlanOptions) -> Plan:
    """Estimate the memory of a training per device, and choose its layout.

    Of the meshes (data x model) and strategies that divide heads, widths and batch,
    the one that fits in memory with the least communication; if none fits, the one that
    takes the least memory, with advice. Nothing of the model is allocated.

    Weights and optimizer state are exact. The rest of a step was compared with XLA's
    memory analysis on CPUs: within 15 % without rematerialization; up to half too small
    with rematerialization on a mesh, or with clipped gradients and long sequences,
    where XLA's CPU scheduler keeps more than it has to (`benchmarks/RESULTS.md`). Leave
    headroom.

    Returns:
        A `Plan`.

    Raises:
        ValueError: for an option that is not accepted, or when no layout divides.

    Examples:
        >>> found = keras_t5gemma.plan(
        ...     "t5gemma_2b_2b", devices=1, memory="16GB", batch=8, length=(512, 128),
        ...     dtype="bfloat16", lora_rank=16,
        ... )
        >>> found.fits
        True
    """
    o.check()
    job = Job(
        config=read_config(o.preset),
        devices=o.devices,
        memory=read_memory(o.memory),
        batch=o.batch,
        length=read_length(o.length),
        optimizer=_read_optimizer(o.optimizer),
        dtype=o.dtype,
        rematerialize=bool(o.rematerialize),
        lora_rank=o.lora_rank,
        quantize=o.quantize,
    )
    mesh = _read_mesh(o.mesh)
    best = _best(job, o.strategy, mesh)
    if best.fits:
        return best
    return dataclasses.replace(best, advice=tuple(_advice(job, o.strategy)))


def _best(
    job: Job, strategy: str | None = None, mesh: Mapping[str, int] | None = None
) -> Plan:
    """The fitting plan with the least communication, else that with least memory."""
    if mesh is not None:
        meshes = [mesh]
    else:
        factors = _divisors(job.devices)
        meshes = [{"data": job.devices // m, "model": m} for m in factors]
    found: list[Plan] = []
    errors: list[ValueError] = []
    for each in meshes:
        for name in STRATEGIES if strategy is None else (strategy,):
            if strategy is None and name == "fsdp" and each.get("data", 1) == 1:
                continue  # The same as "data" or "tensor".
            try:
                found.append(evaluate(job, each, name))
            except ValueError as error:
                errors.append(error)
    if not found:
        raise ValueError(
            f"No layout of {job.devices} devices divides the model and the batch of "
            f"{job.batch}: {errors[0]}"
        ) from errors[0]
    fitting = [p for p in found if p.fits]
    if fitting:
        return min(fitting, key=lambda p: (p.received, p.total))
    return min(found, key=lambda p: p.total)


def _divisors(count: int) -> list[int]:
    small = [m for m in range(1, math.isqrt(count) + 1) if count % m == 0]
    return sorted({*small, *(count // m for m in small)})


def _advice(job: Job, strategy: str | None) -> list[str]:
    """Single changes of the job that make it fit, a phrase each."""
    changes: list[tuple[str, dict[str, Any]]] = []
    if not job.rematerialize:
        changes.append(("rematerialize the blocks", {"rematerialize": True}))
    if job.dtype == "float32":
        changes.append(("dtype mixed_bfloat16", {"dtype": "mixed_bfloat16"}))
    if job.dtype != "bfloat16":
        optimizer = _read_optimizer("adafactor")
        bfloat16 = {"dtype": "bfloat16", "optimizer": optimizer}
        changes.append(("dtype bfloat16 with Adafactor", bfloat16))
    if job.lora_rank is None:
        changes.append(("LoRA of rank 16", {"lora_rank": 16}))
    if job.quantize is None:
        quantized = {"lora_rank": job.lora_rank or 16, "quantize": "int8"}
        changes.append(("LoRA on int8 weights", quantized))
    halves = [job.batch // 2**i for i in range(1, job.batch.bit_length())]
    groups = [[change] for change in changes]
    groups.append([(f"a batch of {b}", {"batch": b}) for b in halves])
    more = [job.devices * 2**i for i in range(1, 13)]
    more = [n for n in more if n <= MAX_ADVISED_DEVICES]
    groups.append([(f"{n} devices", {"devices": n}) for n in more])
    fits = []
    for group in groups:
        for words, change in group:
            try:
                best = _best(dataclasses.replace(job, **change), strategy)
            except ValueError:
                continue
            if best.fits:
                fits.append(f"{words}: {best.total / 1e9:.1f} GB per device")
                break
    return fits or ["no single change: combine LoRA, a smaller batch, more devices"]


def read_memory(memory: int | str) -> int:
    """Parse a number of bytes, or a size with a unit, e.g. `"80GB"` or `"79.6 GiB"`.

    Raises:
        ValueError: for anything else.
    """
    text = str(memory).strip() if isinstance(memory, int | float | str) else ""
    number = text.rstrip("KMGTiB ")
    try:
        size = float(number) * UNITS[text[len(number) :].strip()]
        if 0 < size < math.inf:
            return int(size)
    except (KeyError, ValueError):
        pass
    raise ValueError(
        "`memory` must be a number of bytes, or a size with a unit, e.g. '80GB' or "
        f"'80GiB'; got {shown(memory)}."
    )


def read_config(preset: str | os.PathLike[str] | T5GemmaConfig) -> T5GemmaConfig:
    """Config of a preset, or of a pair of sizes, e.g. `"t5gemma_9b_9b"`.

    Raises:
        ValueError: for an unknown name.
    """
    if isinstance(preset, T5GemmaConfig):
        return preset
    config = catalog.published_config(preset) or catalog.pair_config(str(preset))
    if config is not None:
        return config
    from keras_t5gemma.checkpoints.checkpoint import open_checkpoint

    return open_checkpoint(preset).config


def read_length(length: Any) -> tuple[int, int]:
    """Lengths of encoder and decoder, from one number for both or a pair."""
    pair = (length, length) if isinstance(length, Integral) else length
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise ValueError(
            "`length` must be tokens of encoder and decoder, or one number for both; "
            f"got {shown(length)}."
        )
    source, target = (whole_number(tokens, "length", 1) for tokens in pair)
    return source, target


def _read_mesh(
    mesh: Mapping[str, int] | tuple[int, int] | None,
) -> Mapping[str, int] | None:
    if mesh is None:
        return None
    if not isinstance(mesh, Mapping):
        if not isinstance(mesh, list | tuple) or len(mesh) != 2:
            raise ValueError(
                "`mesh` must be the devices along 'data' and 'model'; got "
                f"{shown(mesh)}."
            )
        mesh = {"data": mesh[0], "model": mesh[1]}
    check_mesh(mesh)
    return mesh


def _read_optimizer(optimizer: Any) -> keras.optimizers.Optimizer:
    if isinstance(optimizer, keras.optimizers.Optimizer):
        return optimizer
    kind = OPTIMIZERS[one_of(optimizer, "optimizer", OPTIMIZERS)]
    return kind(1e-4, global_clipnorm=1.0)

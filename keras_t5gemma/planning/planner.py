"""How much memory a training takes on each of several devices, before there are any."""

import dataclasses
import math

import keras

from keras_t5gemma.checkpoints import presets
from keras_t5gemma.config import T5GemmaConfig
from keras_t5gemma.distribution.layouts import STRATEGIES, check_mesh, check_strategy
from keras_t5gemma.planning.abstract_variables import QUANTIZED
from keras_t5gemma.planning.costs import COMPUTE_BYTES, Job, evaluate
from keras_t5gemma.training.optimizers import OPTIMIZERS

UNITS = {"": 1, "B": 1} | {
    f"{letter}{infix}B": base ** (i + 1)
    for infix, base in (("", 1000), ("i", 1024))
    for i, letter in enumerate("KMGT")
}
MOST_DEVICES = 4096  # That advice looks at.


def plan(
    preset,
    devices,
    memory,
    batch,
    length,
    *,
    optimizer="adamw",
    dtype="mixed_bfloat16",
    rematerialize=True,
    lora_rank=None,
    quantize=None,
    strategy=None,
    mesh=None,
):
    """The layout that trains a model on so many devices, and what it takes of each.

    Of the meshes (data x model) and strategies that divide heads, widths and batch,
    the one that fits in memory with the least communication; when none fits, the one
    that takes the least memory, with advice. Nothing of the model is allocated.

    Weights and optimizer are exact. What a step holds beside them was compared with
    XLA's own account on CPUs: within 15 % without rematerialization, too small by half
    with it on a mesh, or with clipped gradients and long sequences, where XLA's CPU
    scheduler keeps more than it has to (`benchmarks/RESULTS.md`). Leave room.

    Args:
        preset: a name of `keras_t5gemma.presets()`, a pair's such as
            `"t5gemma_9b_9b"`, a folder or handle, or a `T5GemmaConfig`.
        devices: how many.
        memory: of each, in bytes or as `"80GB"`, `"80GiB"`.
        batch: pairs in a step, of all devices together.
        length: tokens of encoder and decoder: a pair, or one number for both.
        optimizer: adafactor, adamw, lion or muon, with gradients clipped by their
            global norm as `finetune` and `pretrain` do; or a Keras optimizer.
        dtype: `"mixed_bfloat16"`, `"bfloat16"` or `"float32"`.
        rematerialize: whether blocks keep their input alone, see `compile`.
        lora_rank: of adapters on queries and values; `None` trains all weights.
        quantize: `"int8"`, `"int4"` or `None`; needs adapters.
        strategy: `"data"`, `"fsdp"` or `"tensor"`; `None` looks at all.
        mesh: dict of `"data"` and `"model"`; `None` looks at all.

    Returns:
        A `Plan`.

    Raises:
        ValueError: for a value that is not accepted, or when no layout divides.
    """
    job = Job(
        config=read_config(preset),
        devices=_whole("devices", devices),
        memory=read_memory(memory),
        batch=_whole("batch", batch),
        length=_read_length(length),
        optimizer=_read_optimizer(optimizer),
        dtype=_among("dtype", dtype, COMPUTE_BYTES),
        rematerialize=bool(rematerialize),
        lora_rank=lora_rank if lora_rank is None else _whole("lora_rank", lora_rank),
        quantize=quantize and _among("quantize", quantize, QUANTIZED),
    )
    if job.quantize and not job.lora_rank:
        raise ValueError(
            f"`quantize` {quantize!r} needs `lora_rank`: quantized weights do not "
            "learn."
        )
    if strategy is not None:
        check_strategy(strategy)
    if mesh is not None:
        check_mesh(mesh)
    best = _best(job, strategy, mesh)
    if best.fits:
        return best
    return dataclasses.replace(best, advice=tuple(_advice(job, strategy)))


def _best(job, strategy=None, mesh=None):
    """Among those that fit the one with least communication, else the smallest."""
    meshes = [mesh]
    if mesh is None:
        factors = [m for m in range(1, job.devices + 1) if job.devices % m == 0]
        meshes = [{"data": job.devices // m, "model": m} for m in factors]
    found, errors = [], []
    for each in meshes:
        for name in STRATEGIES if strategy is None else (strategy,):
            if strategy is None and name == "fsdp" and each.get("data", 1) == 1:
                continue  # It is "data" or "tensor" then.
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


def _advice(job, strategy):
    """What would fit, one change at a time; each a sentence."""
    changes = []
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
    more = [n for n in more if n <= MOST_DEVICES]
    groups.append([(f"{n} devices", {"devices": n}) for n in more])
    fits = []
    for group in groups:
        for words, change in group:
            try:
                best = _best(dataclasses.replace(job, **change), strategy)
            except ValueError:
                continue
            if best.fits:
                fits.append(f"{words}: {best.total / 1e9:.1f} GB a device")
                break
    return fits or ["no single change: combine LoRA, a smaller batch, more devices"]


def read_memory(memory):
    """Bytes of a number, or of a string such as `"80GB"` or `"79.6 GiB"`.

    Raises:
        ValueError: for anything else.
    """
    text = str(memory).strip()
    number = text.rstrip("KMGTiB ")
    try:
        size = float(number) * UNITS[text[len(number) :].strip()]
        if 0 < size < math.inf:
            return int(size)
    except (KeyError, ValueError):
        pass
    raise ValueError(
        "`memory` must be a number of bytes, or one with a unit such as '80GB' or "
        f"'80GiB'; got {memory!r}."
    )


def read_config(preset):
    """The config of a preset, of a pair such as `"t5gemma_9b_9b"`, or a config.

    Raises:
        ValueError: for an unknown name.
    """
    if isinstance(preset, T5GemmaConfig):
        return preset
    config = presets.published_config(preset) or presets.pair_config(preset)
    if config is not None:
        return config
    from keras_t5gemma.checkpoints.checkpoint import open_checkpoint

    return open_checkpoint(preset).config


def _whole(name, value):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a whole number >= 1; got {value!r}.")
    return value


def _among(name, value, accepted):
    if value not in accepted:
        raise ValueError(f"`{name}` must be one of {list(accepted)}; got {value!r}.")
    return value


def _read_length(length):
    pair = (length, length) if isinstance(length, int) else tuple(length)
    if len(pair) != 2:
        raise ValueError(
            "`length` must be tokens of encoder and decoder, or one number for both; "
            f"got {length!r}."
        )
    return tuple(_whole("length", tokens) for tokens in pair)


def _read_optimizer(optimizer):
    if isinstance(optimizer, keras.optimizers.Optimizer):
        return optimizer
    kind = OPTIMIZERS[_among("optimizer", optimizer, OPTIMIZERS)]
    return kind(1e-4, global_clipnorm=1.0)


def rows(result):
    """A `Plan` as `(name, text)` rows of a table."""

    def gigabytes(name, count):
        return name, f"{count / 1e9:,.2f} GB"

    mesh = f"data {result.mesh['data']} x model {result.mesh['model']}"
    found = [
        ("layout", f"{result.strategy}, {mesh}"),
        gigabytes("weights", result.weights),
        gigabytes("optimizer", result.optimizer),
        gigabytes("gradients", result.gradients),
        gigabytes("activations", result.activations),
        gigabytes("  rematerialized", result.activations_rematerialized),
        gigabytes("working, one block", result.working),
        gigabytes("weights cast or gathered", result.copies),
        gigabytes("logits, a part at a time", result.logits),
        gigabytes("most of them at a time", result.step),
        gigabytes("training in all", result.total),
        (
            "of",
            f"{result.memory / 1e9:,.2f} GB: {'fits' if result.fits else 'too much'}",
        ),
        gigabytes("caches of generate", result.caches),
    ]
    moved = [(k, v) for k, v in result.communication.items() if v]
    found += [gigabytes(f"a step receives, {name}", count) for name, count in moved]
    found += [("would fit", line) for line in result.advice]
    return found

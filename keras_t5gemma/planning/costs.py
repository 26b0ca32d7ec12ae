"""What one layout costs a device: bytes of memory, bytes of communication.

Weights and optimizer are those of the real model and optimizer, evaluated without
values (`abstract`), laid out by `layouts.partition`; what a step holds beside them is
`activations`. Communication, in bytes that a device receives in a step, n devices in a
ring, c bytes a number in the compute dtype:

    "data"    all-reduce of the gradients         2 (n - 1) / n gradients
    "fsdp"    all-gather of the weights           (n - 1) / n weights at c bytes; again
                                                  in the backward pass where blocks are
                                                  computed anew
              reduce-scatter of the gradients     (n - 1) / n gradients
              exchange of embedded tokens         (n - 1) / n c B T D, twice a tower
                                                  (the tables are split by width)
    "model"   all-reduce of the states            2 (n - 1) / n c B T D, after each
                                                  sub-layer and before it in the
                                                  backward pass; a third time where
                                                  blocks are computed anew

Of the step that XLA compiles, by `tests/eight_devices.py` on 8 devices with a large
batch: exchange 1.00 times that, gathered weights 0.86 (0.80 when computed anew: small
ones stay where they are), gradients 1.09, states 1.27. XLA's CPU has no reduce-scatter
to compare with.
"""

import dataclasses
import math

import numpy as np

from keras_t5gemma.config import T5GemmaConfig
from keras_t5gemma.distribution.layouts import check_mesh, partition
from keras_t5gemma.planning import activations
from keras_t5gemma.planning.abstract_variables import (
    model_variables,
    optimizer_variables,
)

COMPUTE_BYTES = {"float32": 4, "mixed_bfloat16": 2, "bfloat16": 2}
# Mesh axes that share a variable: in memory, and while it is used.
_STORED, _USED = ("data", "model"), ("model",)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes on each device, and the layout they are for.

    Attributes:
        strategy: `"data"`, `"fsdp"` or `"tensor"`.
        mesh: dict of `"data"` and `"model"`, devices along each axis.
        memory: bytes that a device has.
        weights: of the model.
        optimizer: its state.
        gradients: of all that is trained.
        activations: what blocks keep for the backward pass.
        activations_rematerialized: likewise when they keep their input alone.
        working: of one block's backward pass, with its gradients as they are before
            they are reduced.
        copies: weights cast or gathered to be used.
        logits: the part of them that exists at a time.
        step: the most that a step holds at a time beside weights and optimizer:
            what of the rows above is there together.
        caches: of `generate`, for the same batch and lengths; not with training.
        communication: bytes received in a step, `{what: bytes}`.
        advice: what else would fit, or what to change so that it does.
    """

    strategy: str
    mesh: dict
    memory: int
    weights: int
    optimizer: int
    gradients: int
    activations: int
    activations_rematerialized: int
    working: int
    copies: int
    logits: int
    step: int
    caches: int
    communication: dict
    advice: tuple = ()

    @property
    def total(self):
        """Bytes of training: weights, optimizer, and the most of a step."""
        return self.weights + self.optimizer + self.step

    @property
    def fits(self):
        """Whether a device has that much."""
        return self.total <= self.memory

    @property
    def received(self):
        """Bytes of communication in all."""
        return sum(self.communication.values())


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be trained, checked: the arguments of `plan`."""

    config: T5GemmaConfig
    devices: int
    memory: int
    batch: int
    length: tuple
    optimizer: object
    dtype: str = "mixed_bfloat16"
    rematerialize: bool = True
    lora_rank: int | None = None
    quantize: str | None = None
    at_once: int = activations.AT_ONCE_ON_ACCELERATOR

    def variables(self):
        """Of the model; see `abstract.model_variables`."""
        return model_variables(self.config, self.dtype, self.lora_rank, self.quantize)


def evaluate(job, mesh, strategy):
    """The `Plan` of one layout.

    Raises:
        ValueError: when the layout does not fit the model or the batch.
    """
    check_mesh(mesh)
    data, model = mesh.get("data", 1), mesh.get("model", 1)
    if data * model != job.devices:
        raise ValueError(
            f"`mesh` {mesh} has {data * model} devices; `devices` is {job.devices}."
        )
    if strategy == "data" and model > 1:
        raise ValueError(
            f"`strategy` 'data' uses the mesh axis 'data' alone; got {mesh}."
        )
    if strategy == "tensor" and model == 1 < job.devices:
        raise ValueError(
            f"`strategy` 'tensor' splits nothing over the mesh axis 'data'; got {mesh}."
        )
    if job.batch % data:
        raise ValueError(
            f"`batch` {job.batch} cannot be split over the mesh axis 'data' of {data} "
            "devices."
        )

    def share(variable):
        """Of a variable on one device: all, and without what "data" splits."""
        axes = partition(variable.path, variable.shape, mesh, strategy, job.config)
        shares = [
            1 / math.prod(mesh[a] for a in axes if a in names)
            for names in (_STORED, _USED)
        ]
        return shares

    variables, c = job.variables(), COMPUTE_BYTES[job.dtype]
    weights = gathered = reduced = repeated = 0
    gradients, largest, whole_gradients, copies = {}, {}, {}, {}
    for v in variables:
        mine, whole = share(v)
        weights += v.nbytes * mine
        part, is_split = _part(v.path), mine < whole
        is_table = "/token_embedding/" in v.path
        is_looked_up = is_table and part == "encoder"
        if v.trainable:
            _add(gradients, part, v.nbytes * mine)
            largest[part] = max(largest.get(part, 0), v.nbytes * mine)
            if not is_split:
                repeated += v.nbytes * whole
            elif not is_looked_up:
                reduced += v.nbytes * whole
                if not is_table:
                    _add(whole_gradients, part, v.nbytes * whole)
        numbers, is_cast = _numbers(v, job)
        if is_looked_up:  # Rows are found where they lie, then cast.
            continue
        if is_split:
            gathered += numbers * c * whole
        # Of the logit table a part at a time: see `activations.logits_chunk`.
        if is_cast or (is_split and not is_table):
            _add(copies, part, numbers * c * (mine if is_table else whole))
    trained = sum(gradients.values())
    state = sum(
        v.nbytes * share(v)[0] for v in optimizer_variables(job.optimizer, variables)
    )
    around = (data - 1) / data
    s = activations.Shape(
        job.batch // data, *job.length, c, model, job.lora_rank is None
    )
    parts = [
        dataclasses.replace(p, working=p.working + whole_gradients.get(p.name, 0))
        for p in activations.parts_of_step(job.config, s)
    ]
    chunk = exchanged = 0
    if strategy == "fsdp":
        exchanged = 2 * around * _embedded(job.config, s)
    if job.config.decoder is not None:
        shards = 1 if strategy == "data" else model
        pieces = data if strategy == "fsdp" else 1
        chunk = activations.logits_chunk(job.config, s, shards, pieces, job.at_once)
    passes = 2 + job.rematerialize
    states = _reduced_states(job.config, s) * 2 * (model - 1) / model
    communication = {
        "all-gather of weights": (1 + job.rematerialize) * around * gathered,
        "reduce-scatter of gradients": around * reduced,
        "all-reduce of gradients": 2 * around * repeated,
        "all-reduce of states": passes * states,
        "exchange of embedded tokens": exchanged,
    }
    optimizer = job.optimizer
    holds_all = bool(optimizer.global_clipnorm or optimizer.gradient_accumulation_steps)
    step = activations.peak(
        parts,
        gradients if holds_all else largest,
        copies,
        chunk,
        job.rematerialize,
        holds_all,
    )
    return Plan(
        strategy=strategy,
        mesh={"data": data, "model": model},
        memory=job.memory,
        weights=math.ceil(weights),
        optimizer=math.ceil(state),
        gradients=math.ceil(trained),
        activations=math.ceil(sum(p.kept for p in parts)),
        activations_rematerialized=math.ceil(sum(p.entered for p in parts)),
        working=math.ceil(max(p.working for p in parts)),
        copies=math.ceil(sum(copies.values())),
        logits=math.ceil(chunk),
        step=step,
        caches=math.ceil(activations.cache_bytes(job.config, s)),
        communication={k: math.ceil(v) for k, v in communication.items()},
    )


def _add(sums, name, count):
    sums[name] = sums.get(name, 0) + count


def _part(path):
    folders = path.split("/")
    return "/".join(folders[: 2 if folders[1].startswith("block_") else 1])


def _numbers(variable, job):
    """How many numbers a variable has, and whether they are cast to be used."""
    count = math.prod(variable.shape)
    if len(variable.shape) < 2:
        return count, False
    if variable.dtype == "int8":
        return count * (2 if job.quantize == "int4" else 1), True
    return count, np.dtype(variable.dtype).itemsize > COMPUTE_BYTES[job.dtype]


def _embedded(config, s):
    """Bytes of the rows that both towers look up, c B T D."""
    towers = ((config.encoder, s.source), (config.decoder, s.target))
    return sum(
        s.batch * length * stack.hidden_dim * s.itemsize
        for stack, length in towers
        if stack is not None
    )


def _reduced_states(config, s):
    """Bytes of all states that are summed over "model" in a forward pass."""
    total = 0
    for side, length, sub_layers in (
        ("encoder", s.source, 2),
        ("decoder", s.target, 3),
    ):
        stack = getattr(config, side)
        if stack is not None:
            rows = stack.num_layers * sub_layers + 1  # And the embedding's.
            total += rows * s.batch * length * stack.hidden_dim * s.itemsize
    return total

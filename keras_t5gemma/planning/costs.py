"""Memory and communication of one layout, per device.

Weights and optimizer state are those of the real model and optimizer, evaluated without
values (`abstract_variables`) and laid out by `layouts.partition`; `activations` has the
rest of a step. Communication, in bytes that a device receives per step, n devices in a
ring, c bytes per number in the compute dtype:

    "data"    all-reduce of the gradients         2 (n - 1) / n gradients
    "fsdp"    all-gather of the weights           (n - 1) / n weights at c bytes; again
                                                  in the backward pass with
                                                  rematerialization
              reduce-scatter of the gradients     (n - 1) / n gradients
              exchange of embedded tokens         (n - 1) / n c B T D, twice a tower
                                                  (the tables are split by width)
    "model"   all-reduce of the states            2 (n - 1) / n c B T D, after each
                                                  sub-layer and before it in the
                                                  backward pass; a third time with
                                                  rematerialization

XLA's compiled step has (`tests/helpers/eight_devices.py`, 8 devices, large batch):
exchange 1.00 times that, gathered weights 0.86 (0.80 with rematerialization: small
weights are not split), gradients 1.09, states 1.27. XLA's CPU backend has no
reduce-scatter to compare with.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_t5gemma.config import T5GemmaConfig
from keras_t5gemma.distribution.layouts import check_mesh, partition
from keras_t5gemma.planning import activations
from keras_t5gemma.planning.abstract_variables import (
    Variable,
    model_variables,
    optimizer_variables,
)

COMPUTE_BYTES = {"float32": 4, "mixed_bfloat16": 2, "bfloat16": 2}
# Mesh axes over which a variable is split: in memory, and while it is used.
_STORED, _USED = ("data", "model"), ("model",)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A layout, and the bytes that it takes on each device.

    Attributes:
        strategy: `"data"`, `"fsdp"` or `"tensor"`.
        mesh: devices along each axis, `"data"` and `"model"`.
        memory: memory of a device.
        weights: weights of the model.
        optimizer: optimizer state.
        gradients: gradients of all trained weights.
        activations: activations that blocks keep for the backward pass.
        activations_rematerialized: the same when blocks keep only their input.
        recomputed: activations of one block, recomputed from its input.
        working: backward pass of one block, with its gradients before the reduction.
        copies: weights cast or gathered for use.
        copies_rematerialized: the same with rematerialization: logit table, one block.
        logits: one chunk of the logits, with its gradient.
        step: peak of a step on top of weights and optimizer: the largest sum of parts
            of the rows above that exist at the same time.
        caches: key/value caches to generate for the same batch and lengths, instead of
            training.
        communication: bytes received per step, `{collective: bytes}`.
        advice: changes that make the training fit.
    """

    strategy: str
    mesh: dict
    memory: int
    weights: int
    optimizer: int
    gradients: int
    activations: int
    activations_rematerialized: int
    recomputed: int
    working: int
    copies: int
    copies_rematerialized: int
    logits: int
    step: int
    caches: int
    communication: dict
    advice: tuple = ()

    @property
    def total(self) -> int:
        """Weights, optimizer state and peak of a step, in bytes."""
        return self.weights + self.optimizer + self.step

    @property
    def fits(self) -> bool:
        """Whether the total is within the memory of a device."""
        return self.total <= self.memory

    @property
    def received(self) -> int:
        """Bytes received per step in total."""
        return sum(self.communication.values())


@dataclasses.dataclass(frozen=True)
class Job:
    """A training to plan: the checked options of `plan`."""

    config: T5GemmaConfig
    devices: int
    memory: int
    batch: int
    length: tuple[int, int]
    optimizer: Any
    dtype: str = "mixed_bfloat16"
    rematerialize: bool = True
    lora_rank: int | None = None
    quantize: str | None = None
    cpu: bool = False

    def variables(self) -> tuple[Variable, ...]:
        """Variables of the model; see `model_variables`."""
        return model_variables(self.config, self.dtype, self.lora_rank, self.quantize)


def evaluate(job: Job, mesh: Mapping[str, int], strategy: str) -> Plan:
    """Compute the `Plan` of one layout.

    Raises:
        ValueError: when the layout does not fit the model or the batch.
    """
    _check_layout(job, mesh, strategy)
    data, model = mesh.get("data", 1), mesh.get("model", 1)
    found = _weights(job, mesh, strategy)
    s = activations.Shape(
        job.batch // data,
        *job.length,
        COMPUTE_BYTES[job.dtype],
        model,
        job.lora_rank is None,
        job.cpu,
    )
    parts = [
        dataclasses.replace(
            p, working=p.working + found.unreduced_gradients.get(p.name, 0)
        )
        for p in activations.parts_of_step(job.config, s)
    ]
    chunk = 0.0
    if job.config.decoder is not None:
        shards = 1 if strategy == "data" else model
        pieces = data if strategy == "fsdp" else 1
        chunk = activations.logits_chunk(job.config, s, shards, pieces)
    optimizer = job.optimizer
    holds_all = bool(optimizer.global_clipnorm or optimizer.gradient_accumulation_steps)
    step = activations.peak(
        parts,
        found.gradients if holds_all else found.largest_gradient,
        found.copies,
        chunk,
        job.rematerialize,
        holds_all,
    )
    return Plan(
        strategy=strategy,
        mesh={"data": data, "model": model},
        memory=job.memory,
        weights=math.ceil(found.weights),
        optimizer=math.ceil(found.optimizer),
        gradients=math.ceil(sum(found.gradients.values())),
        activations=math.ceil(sum(p.kept for p in parts)),
        activations_rematerialized=math.ceil(sum(p.entered for p in parts)),
        recomputed=math.ceil(max(p.kept - p.entered for p in parts)),
        working=math.ceil(max(p.working for p in parts)),
        copies=math.ceil(sum(found.copies.values())),
        copies_rematerialized=math.ceil(_largest_copies(found.copies, parts)),
        logits=math.ceil(chunk),
        step=step,
        caches=math.ceil(activations.cache_bytes(job.config, s)),
        communication=_communication(job, s, found, data, model, strategy),
    )


def _largest_copies(copies: dict[str, float], parts: list[activations.Part]) -> float:
    """Bytes of the copies that exist at once with rematerialization."""
    last = parts[-1].name.split("/")[0]
    others = [count for name, count in copies.items() if name != last]
    return copies.get(last, 0) + max(others, default=0)


def _check_layout(job: Job, mesh: Mapping[str, int], strategy: str) -> None:
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


@dataclasses.dataclass
class _Weights:
    """Bytes of weights and gradients on one device; dicts are by part of the model."""

    weights: float = 0
    optimizer: float = 0
    gathered: float = 0  # Copies in the compute dtype of weights split over "data".
    reduced: float = 0  # Gradients that are reduced and scattered over "data".
    repeated: float = 0  # Gradients that are the same on all of "data".
    gradients: dict[str, float] = dataclasses.field(default_factory=dict)
    largest_gradient: dict[str, float] = dataclasses.field(default_factory=dict)
    unreduced_gradients: dict[str, float] = dataclasses.field(default_factory=dict)
    copies: dict[str, float] = dataclasses.field(default_factory=dict)


def _weights(job: Job, mesh: Mapping[str, int], strategy: str) -> _Weights:
    def shares(variable: Variable) -> list[float]:
        """Shares of a variable that one device stores, and that it uses."""
        axes = partition(variable.path, variable.shape, mesh, strategy, job.config)
        sizes = [[mesh[a] for a in axes if a and a in n] for n in (_STORED, _USED)]
        return [1 / math.prod(size) for size in sizes]

    variables, c = job.variables(), COMPUTE_BYTES[job.dtype]
    found = _Weights()
    for v in variables:
        stored, used = shares(v)
        found.weights += v.nbytes * stored
        part, is_split = _part(v.path), stored < used
        is_table = "/token_embedding/" in v.path
        is_looked_up = is_table and part == "encoder"
        if v.trainable:
            gradient = v.nbytes * stored
            _add(found.gradients, part, gradient)
            largest = found.largest_gradient.get(part, 0)
            found.largest_gradient[part] = max(largest, gradient)
            if not is_split:
                found.repeated += v.nbytes * used
            elif not is_looked_up:
                found.reduced += v.nbytes * used
                if not is_table:
                    _add(found.unreduced_gradients, part, v.nbytes * used)
        numbers, is_cast = _numbers(v, job)
        if is_looked_up:  # Rows are looked up where they are stored, then cast.
            continue
        if is_split:
            found.gathered += numbers * c * used
        # The logit table is used in chunks: see `activations.logits_chunk`.
        if is_cast or (is_split and not is_table):
            _add(found.copies, part, numbers * c * (stored if is_table else used))
    state = optimizer_variables(job.optimizer, variables)
    found.optimizer = sum(v.nbytes * shares(v)[0] for v in state)
    return found


def _communication(
    job: Job,
    s: activations.Shape,
    found: _Weights,
    data: int,
    model: int,
    strategy: str,
) -> dict[str, int]:
    around = (data - 1) / data
    exchanged = 2 * _embedded(job.config, s) if strategy == "fsdp" else 0
    states = _reduced_states(job.config, s) * 2 * (model - 1) / model
    received = {
        "all-gather of weights": (1 + job.rematerialize) * around * found.gathered,
        "reduce-scatter of gradients": around * found.reduced,
        "all-reduce of gradients": 2 * around * found.repeated,
        "all-reduce of states": (2 + job.rematerialize) * states,
        "exchange of embedded tokens": around * exchanged,
    }
    return {name: math.ceil(count) for name, count in received.items()}


def _add(sums: dict[str, float], name: str, count: float) -> None:
    sums[name] = sums.get(name, 0) + count


def _part(path: str) -> str:
    folders = path.split("/")
    return "/".join(folders[: 2 if folders[1].startswith("block_") else 1])


def _numbers(variable: Variable, job: Job) -> tuple[int, bool]:
    """Count of a variable's numbers, and whether they are cast for use."""
    count = math.prod(variable.shape)
    if len(variable.shape) < 2:
        return count, False
    if variable.dtype == "int8":
        return count * (2 if job.quantize == "int4" else 1), True
    return count, np.dtype(variable.dtype).itemsize > COMPUTE_BYTES[job.dtype]


def _embedded(config: T5GemmaConfig, s: activations.Shape) -> int:
    """Bytes of the embeddings that both towers look up, c B T D."""
    towers = ((config.encoder, s.source), (config.decoder, s.target))
    return sum(
        s.batch * length * stack.hidden_dim * s.itemsize
        for stack, length in towers
        if stack is not None
    )


def _reduced_states(config: T5GemmaConfig, s: activations.Shape) -> int:
    """Bytes of the states that a forward pass sums over "model"."""
    total = 0
    for side, length, sub_layers in (
        ("encoder", s.source, 2),
        ("decoder", s.target, 3),
    ):
        stack = getattr(config, side)
        if stack is not None:
            rows = stack.num_layers * sub_layers + 1  # And the embedding.
            total += rows * s.batch * length * stack.hidden_dim * s.itemsize
    return total

"""Cross-entropy of tokens, and its gradients, without an array of all logits.

The `(tokens, 256000)` logits, of which a plain training step holds several copies, are
its largest arrays. Here they are computed one chunk of the vocabulary at a time, in the
forward pass and again in the backward pass; the logits of a teacher too.
"""

import dataclasses

from keras import ops

from keras_t5gemma.distribution import mesh
from keras_t5gemma.modeling.float_products import matmul
from keras_t5gemma.modeling.soft_cap import soft_cap
from keras_t5gemma.training.vocabulary_chunks import (
    add_mass,
    add_rows,
    chunk_count,
    chunk_ids,
    chunk_logits,
    chunk_rows,
    logits_at_once,
    loop,
    write_rows,
)
from keras_t5gemma.utils.backends import compiled
from keras_t5gemma.utils.buckets import LOGITS_ON_ACCELERATOR
from keras_t5gemma.utils.types import Tensor


@dataclasses.dataclass
class TeacherTargets:
    """A teacher's distribution of the next token at N positions.

    Either its states and logit table, for the whole vocabulary, or its top K tokens.

    Attributes:
        label_share: float32 `(N,)`, the share of the label in a token's target; the
            teacher's distribution has the rest.
        temperature: above 1 flattens both distributions.
        states: `(N, E)`, the teacher's.
        table: `(V, E)`, its logit table.
        cap: soft cap on its logits, or `None`.
        ids: int `(N, K)`, its top tokens; `None` for the whole vocabulary.
        shares: float32 `(N, K)`, their probabilities at the temperature, with sum 1.
    """

    label_share: Tensor
    temperature: float = 1.0
    states: Tensor = None
    table: Tensor = None
    cap: float | None = None
    ids: Tensor = None
    shares: Tensor = None


def token_losses(
    states: Tensor,
    table: Tensor,
    labels: Tensor,
    cap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    learn_table: bool = True,
    teacher: TeacherTargets | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of labels, or of a teacher's distribution, from decoder states.

    With logits `l`, soft-capped, of V classes and `Z = logsumexp(l)`, a label y costs
    `(1 - e) (Z - l_y) + e (Z - mean(l)) + z Z^2` with label smoothing e
    (arXiv 1512.00567) and the z-loss of arXiv 2204.02311. With a teacher, whose
    distribution at temperature t is P (arXiv 1503.02531), and a label's share a, it is
    `a ((1 - e) (Z - l_y) + e (Z - mean(l))) + z Z^2
    + (1 - a) t^2 (logsumexp(l / t) - sum(P l) / t)`.

    Args:
        states: `(N, D)`, decoder states of N tokens.
        table: logit table `(V, D)`, in the dtype of the states.
        labels: int `(N,)`, in `[0, V)`.
        cap: soft cap on the logits, or `None`.
        label_smoothing: e, share of the target spread over the vocabulary.
        z_loss: z, weight of the squared log-normalizer; 1e-4 is usual.
        learn_table: `False` computes no gradient by the table.
        teacher: a `TeacherTargets`, or `None`.

    Returns:
        `(losses, log_probs, hits)`, float32 `(N,)` each: the losses, the only output
        with gradients, by states and table; the log-probabilities of the labels; and 1
        where no logit is larger than the label's.

    Raises:
        ValueError: when the teacher's table has fewer rows.
    """
    size, _ = table.shape
    if teacher is not None and teacher.table is not None:
        if teacher.table.shape[0] < size:
            raise ValueError(
                f"`teacher` must have a logit for each of the {size} ids of the "
                f"student's vocabulary; it has {teacher.table.shape[0]}."
            )
    shards = mesh.shards_of_rows(size)
    loss = _ChunkedLoss(
        labels=ops.cast(labels, "int32"),
        cap=cap,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        learn_table=learn_table,
        teacher=teacher,
        size=size,
        shards=shards,
        chunks=chunk_count(size // shards, states.shape[0], logits_at_once(states)),
    )
    forward, backward = compiled(loss.forward), compiled(loss.backward)

    def compute(states, table=table):
        results, log_z = forward(states, table)

        def gradient(*args, upstream=None):  # PyTorch passes it by name.
            upstream = args[0] if upstream is None else upstream
            found = backward(states, table, log_z, upstream[:, 0])
            return found if learn_table else found[0]

        return results, gradient

    arguments = (states, table) if learn_table else (states,)
    results = ops.custom_gradient(compute)(*arguments)
    return tuple(results[:, i] for i in range(3))


@dataclasses.dataclass(eq=False)
class _ChunkedLoss:
    """The forward and backward pass of `token_losses`, chunk by chunk.

    Args:
        labels: as all arguments that are not listed, see `token_losses`.
        size: rows of the table, V.
        shards: over how many devices the rows are split.
        chunks: how many chunks the rows of a shard are cut into.
    """

    labels: Tensor
    cap: float | None
    label_smoothing: float
    z_loss: float
    learn_table: bool
    teacher: TeacherTargets | None
    size: int
    shards: int
    chunks: int

    def __post_init__(self):
        teacher = self.teacher
        self.step = self.size // self.shards // self.chunks
        self.label_share = 1.0 if teacher is None else teacher.label_share
        self.temperature = 1.0 if teacher is None else teacher.temperature
        self.is_dense = teacher is not None and teacher.ids is None

    def _logits(self, states, table, chunk):
        rows = chunk_rows(table, chunk, self.step, self.shards)
        return chunk_logits(states, rows, self.cap)

    def _teacher_logits(self, chunk):
        """Those of the teacher, divided by the temperature."""
        teacher = self.teacher
        rows = chunk_rows(teacher.table[: self.size], chunk, self.step, self.shards)
        return chunk_logits(teacher.states, rows, teacher.cap) / self.temperature

    def _is_label(self, chunk):
        ids = chunk_ids(chunk, self.step, self.size, self.shards)
        return self.labels[:, None] == ids[None]

    def forward(self, states: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Losses, log-probabilities and hits, and three log-normalizers.

        Returns:
            `(results, log_zs)`, float32 `(N, 3)` each. The log-normalizers are those
            of the logits, of the logits divided by the temperature, and of the
            teacher's logits divided by the temperature.
        """

        def add(chunk, sums):
            new = dict(sums)
            logits = self._logits(states, table, chunk)
            new["plain"], _, _ = add_mass(sums["plain"], logits)
            new["total"] = sums["total"] + ops.sum(logits, axis=1)
            label = ops.where(self._is_label(chunk), logits, 0.0)
            new["label"] = sums["label"] + ops.sum(label, axis=1)
            if self.temperature != 1:
                tempered = logits / self.temperature
                new["tempered"], _, _ = add_mass(sums["tempered"], tempered)
            if self.is_dense:
                logits_t = self._teacher_logits(chunk)
                new["teacher"], kept, mass = add_mass(sums["teacher"], logits_t)
                more = ops.sum(mass * logits, axis=1)
                new["expected"] = sums["expected"] * kept + more
            return new

        zeros = ops.zeros_like(states[:, 0], dtype="float32")
        masses = ("plain", "tempered", "teacher")
        start = {name: (zeros - 1e30, zeros) for name in masses}
        start |= {name: zeros for name in ("total", "label", "expected")}
        sums = loop(self.chunks, add, start)
        log_zs = [sums[n][0] + ops.log(ops.maximum(sums[n][1], 1e-30)) for n in masses]
        losses = self._losses(states, table, sums, *log_zs[:2])
        hits = ops.cast(sums["label"] >= sums["plain"][0], "float32")
        results = ops.stack([losses, sums["label"] - log_zs[0], hits], axis=1)
        return results, ops.stack(log_zs, axis=1)

    def _losses(self, states, table, sums, log_z, tempered_log_z):
        losses = log_z - (1 - self.label_smoothing) * sums["label"]
        losses = losses - self.label_smoothing * sums["total"] / self.size
        if self.teacher is not None:
            temperature, share = self.temperature, self.label_share
            if self.is_dense:
                expected_logit = sums["expected"] / sums["teacher"][1]
            else:
                expected_logit = _expected_logit(states, table, self.teacher, self.cap)
            taught = tempered_log_z if temperature != 1 else log_z
            taught = taught - expected_logit / temperature
            losses = share * losses + (1 - share) * temperature**2 * taught
        return losses + self.z_loss * ops.square(log_z)

    def backward(
        self, states: Tensor, table: Tensor, log_zs: Tensor, upstream: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of `sum(upstream * losses)` by the states and the table."""
        log_z, tempered_log_z, teacher_log_z = (log_zs[:, i : i + 1] for i in range(3))
        temperature, teacher = self.temperature, self.teacher
        share = self.label_share if teacher is None else self.label_share[:, None]
        scale = share + 2 * self.z_loss * log_z
        upstream = upstream[:, None]

        def slope_of(logits, chunk):
            target = ops.where(self._is_label(chunk), 1 - self.label_smoothing, 0.0)
            target = share * (target + self.label_smoothing / self.size)
            if self.is_dense:
                likely = ops.exp(self._teacher_logits(chunk) - teacher_log_z)
                target = target + (1 - share) * temperature * likely
            slope = scale * ops.exp(logits - log_z) - target
            if teacher is not None:
                norm = log_z if temperature == 1 else tempered_log_z
                likely = ops.exp(logits / temperature - norm)
                slope = slope + (1 - share) * temperature * likely
            slope = upstream * slope
            if self.cap is not None:
                slope = slope * (1 - ops.square(logits / self.cap))
            return ops.cast(slope, states.dtype)

        def add(chunk, found):
            by_states, by_table = found
            rows = chunk_rows(table, chunk, self.step, self.shards)
            slope = slope_of(self._logits(states, table, chunk), chunk)
            new = ops.cast(matmul(slope, rows), "float32")
            if self.learn_table:
                by_rows = mesh.lay_out_table(matmul(ops.transpose(slope), states))
                by_table = write_rows(by_table, chunk * self.step, by_rows, self.shards)
            return by_states + new, by_table

        # Every row is written. Ones, not zeros: XLA would keep one table of zeros for
        # this and for the gradient of an embedding, through the whole backward pass.
        by_table = ops.zeros((0,))
        if self.learn_table:
            by_table = mesh.lay_out_table(ops.ones_like(table))
        found = (ops.zeros_like(states, dtype="float32"), by_table)
        found = loop(self.chunks, add, found)
        if teacher is not None and not self.is_dense:
            scale = upstream[:, 0] * (1 - self.label_share) * temperature
            found = _add_expected_logit_gradient(
                states, table, teacher, self.cap, scale, found, self.learn_table
            )
        by_states, by_table = found
        return ops.cast(by_states, states.dtype), by_table


def _chosen(states, table, teacher, cap, i):
    """The teacher's i-th token at each position: ids, shares, rows and logits."""
    ids, shares = (ops.take(x, i, axis=1) for x in (teacher.ids, teacher.shares))
    rows = ops.take(table, ids, axis=0)
    logits = ops.sum(ops.cast(states, "float32") * ops.cast(rows, "float32"), axis=1)
    logits = soft_cap(logits, cap)
    return ids, shares, rows, logits


def _expected_logit(states, table, teacher, cap):
    """Mean of the logits under the teacher's top tokens, `(N,)`."""

    def add(i, total):
        _, shares, _, logits = _chosen(states, table, teacher, cap, i)
        return total + shares * logits

    zeros = ops.zeros_like(states[:, 0], dtype="float32")
    return loop(teacher.ids.shape[1], add, zeros)


def _add_expected_logit_gradient(
    states, table, teacher, cap, scale, found, learn_table
):
    """Gradients by states and table, plus those of `- scale * _expected_logit`."""

    def add(i, found):
        by_states, by_table = found
        ids, shares, rows, logits = _chosen(states, table, teacher, cap, i)
        slope = -scale * shares
        if cap is not None:
            slope = slope * (1 - ops.square(logits / cap))
        by_states = by_states + slope[:, None] * ops.cast(rows, "float32")
        if learn_table:
            rows = slope[:, None] * ops.cast(states, "float32")
            by_table = add_rows(by_table, ids, ops.cast(rows, by_table.dtype))
        return by_states, by_table

    return loop(teacher.ids.shape[1], add, found)


def top_choices(
    states: Tensor, table: Tensor, cap: float | None, count: int
) -> tuple[Tensor, Tensor]:
    """The most likely tokens of each position, without an array of all logits.

    Args:
        states: `(N, E)`.
        table: `(V, E)`.
        cap: soft cap on the logits, or `None`.
        count: number of tokens, K.

    Returns:
        `(ids, log_probs)`, int32 and float32 `(N, K)`, the most likely first.
    """
    size, _ = table.shape
    # Every chunk is sorted: few large ones, none smaller than the number of tokens.
    chunks = chunk_count(size, states.shape[0], LOGITS_ON_ACCELERATOR)
    while size // chunks < count:
        chunks //= 2
    step = size // chunks

    def find(states, table):
        def add(chunk, found):
            values, ids, sums = found
            logits = chunk_logits(states, chunk_rows(table, chunk, step), cap)
            sums, _, _ = add_mass(sums, logits)
            new, places = ops.top_k(logits, count)
            ids = ops.concatenate([ids, ops.cast(places, "int32") + chunk * step], 1)
            values, places = ops.top_k(ops.concatenate([values, new], 1), count)
            return values, ops.take_along_axis(ids, places, axis=1), sums

        zeros = ops.zeros_like(states[:, 0], dtype="float32")
        few = ops.tile(zeros[:, None], (1, count))
        start = (few - 1e30, ops.cast(few, "int32"), (zeros - 1e30, zeros))
        values, ids, (largest, mass) = loop(chunks, add, start)
        return ids, values - (largest + ops.log(mass))[:, None]

    return compiled(find)(states, table)

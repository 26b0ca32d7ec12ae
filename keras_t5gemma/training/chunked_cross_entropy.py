"""The training loss of tokens, without their logits.

The `(tokens, 256000)` logits are the largest array of a plain training step, several
times. Here they exist part by part, a slice of the vocabulary at a time, in the
forward pass and again, computed anew, in the backward pass; a teacher's likewise.
"""

import dataclasses
from typing import Any

import keras
from keras import ops

from keras_t5gemma.distribution import mesh
from keras_t5gemma.utils.buckets import (
    LOGITS_ON_ACCELERATOR,
    LOGITS_ON_CPU,
    ceil_div,
    vocabulary_chunks,
)


@dataclasses.dataclass
class TeacherTargets:
    """What a teacher would write in the place of N tokens.

    Either its states and table, for its whole distribution, or a few choices.

    Attributes:
        label_share: float32 `(N,)`, the share of the label in a token's target; the
            teacher's distribution has the rest.
        temperature: above 1 makes both distributions flatter.
        states: `(N, E)`, the teacher's.
        table: `(V, E)`, its logit table.
        cap: soft cap on its logits, or `None`.
        ids: int `(N, K)`, choices; `None` for all of the vocabulary.
        shares: float32 `(N, K)`, their probabilities, at the temperature; sums are 1.
    """

    label_share: Any
    temperature: float = 1.0
    states: Any = None
    table: Any = None
    cap: float | None = None
    ids: Any = None
    shares: Any = None


def token_losses(
    states,
    table,
    labels,
    cap=None,
    label_smoothing=0.0,
    z_loss=0.0,
    learn_table=True,
    teacher=None,
):
    """Cross-entropy of each label, or with what a teacher says, from decoder states.

    With logits `l`, soft-capped, of V classes and `Z = logsumexp(l)`, a label y costs
    `(1 - e) (Z - l_y) + e (Z - mean(l)) + z Z^2` with label smoothing e
    (arXiv 1512.00567) and the z-loss of arXiv 2204.02311. With a teacher, whose
    distribution at temperature t is P (arXiv 1503.02531), and a label's share a, it is
    `a ((1 - e) (Z - l_y) + e (Z - mean(l))) + z Z^2
    + (1 - a) t^2 (logsumexp(l / t) - sum(P l) / t)`.

    Args:
        states: `(N, D)`, N tokens.
        table: logit table `(V, D)`, of the dtype of the states.
        labels: int `(N,)`, in `[0, V)`.
        cap: soft cap on the logits, or `None`.
        label_smoothing: e, share of the target spread over the vocabulary.
        z_loss: z, weight of the squared log-normalizer; 1e-4 is usual.
        learn_table: `False` computes no gradient by the table.
        teacher: a `TeacherTargets`, or `None`.

    Returns:
        `(losses, log_probs, hits)`, float32 `(N,)` each: the losses, which alone can be
        differentiated, by states and table; the labels' log-probabilities; and 1 where
        no other logit is above the label's.

    Raises:
        ValueError: when the teacher's table has fewer rows.
    """
    size, _ = table.shape
    theirs = (
        size if teacher is None or teacher.table is None else teacher.table.shape[0]
    )
    if theirs < size:
        raise ValueError(
            f"`teacher` must have a logit for each of the {size} ids of the student's "
            f"vocabulary; it has {theirs}."
        )
    shards = mesh.shards_of_rows(size)
    parts = _parts(size // shards, states.shape[0], _logits_at_once(states))
    step = size // shards // parts
    labels = ops.cast(labels, "int32")
    share = 1.0 if teacher is None else teacher.label_share  # Of the label: a.
    heat = 1.0 if teacher is None else teacher.temperature
    is_dense = teacher is not None and teacher.ids is None

    def logits_of(states, table, part):
        return _logits(states, _rows(table, part, step, shards), cap)

    def taught(part):
        rows = _rows(teacher.table[:size], part, step, shards)
        return _logits(teacher.states, rows, teacher.cap) / heat

    def is_label(labels, part):
        return labels[:, None] == _ids(part, step, size, shards)[None]

    def read(states, table):
        def add(part, sums):
            new = dict(sums)
            logits = logits_of(states, table, part)
            new["own"], _, _ = _add_mass(sums["own"], logits)
            new["total"] = sums["total"] + ops.sum(logits, axis=1)
            mine = ops.where(is_label(labels, part), logits, 0.0)
            new["chosen"] = sums["chosen"] + ops.sum(mine, axis=1)
            if heat != 1:
                new["soft"], _, _ = _add_mass(sums["soft"], logits / heat)
            if is_dense:
                new["theirs"], kept, mass = _add_mass(sums["theirs"], taught(part))
                new["agreed"] = sums["agreed"] * kept + ops.sum(mass * logits, axis=1)
            return new

        zeros = ops.zeros_like(states[:, 0], dtype="float32")
        start = {name: (zeros - 1e30, zeros) for name in ("own", "soft", "theirs")}
        start |= {name: zeros for name in ("total", "chosen", "agreed")}
        sums = _loop(parts, add, start)
        own, soft, theirs = (
            sums[name][0] + ops.log(ops.maximum(sums[name][1], 1e-30))
            for name in ("own", "soft", "theirs")
        )
        losses = own - (1 - label_smoothing) * sums["chosen"]
        losses = losses - label_smoothing * sums["total"] / size
        if teacher is not None:
            if is_dense:
                agreed = sums["agreed"] / sums["theirs"][1]
            else:
                agreed = _expected_logits(states, table, teacher, cap)
            taken = (soft if heat != 1 else own) - agreed / heat
            losses = share * losses + (1 - share) * heat**2 * taken
        losses = losses + z_loss * ops.square(own)
        hits = ops.cast(sums["chosen"] >= sums["own"][0], "float32")
        results = ops.stack([losses, sums["chosen"] - own, hits], axis=1)
        return results, ops.stack([own, soft, theirs], axis=1)

    def gradients(states, table, normalizers, upstream):
        own, soft, theirs = (normalizers[:, i : i + 1] for i in range(3))
        a = share if teacher is None else share[:, None]
        scale = a + 2 * z_loss * own
        upstream = upstream[:, None]

        def add(part, sums):
            by_states, by_table = sums
            rows = _rows(table, part, step, shards)
            logits = logits_of(states, table, part)
            target = ops.where(is_label(labels, part), 1 - label_smoothing, 0.0)
            target = a * (target + label_smoothing / size)
            if is_dense:
                target = target + (1 - a) * heat * ops.exp(taught(part) - theirs)
            slope = scale * ops.exp(logits - own) - target
            if teacher is not None:
                norm = own if heat == 1 else soft
                slope = slope + (1 - a) * heat * ops.exp(logits / heat - norm)
            slope = upstream * slope
            if cap is not None:
                slope = slope * (1 - ops.square(logits / cap))
            slope = ops.cast(slope, states.dtype)
            new = ops.cast(ops.matmul(slope, rows), "float32")
            if learn_table:
                by_rows = mesh.lay_out_table(ops.matmul(ops.transpose(slope), states))
                by_table = _write(by_table, part * step, by_rows, shards)
            return by_states + new, by_table

        # Every row is written. Ones, not zeros: XLA would keep one table of zeros for
        # this and for the gradient of an embedding, through the whole backward pass.
        by_table = ops.zeros((0,))
        if learn_table:
            by_table = mesh.lay_out_table(ops.ones_like(table))
        found = (ops.zeros_like(states, dtype="float32"), by_table)
        found = _loop(parts, add, found)
        if teacher is not None and not is_dense:
            scale = upstream[:, 0] * (1 - share) * heat
            found = _pull(states, table, teacher, cap, scale, found, learn_table)
        by_states, by_table = found
        return ops.cast(by_states, states.dtype), by_table

    read, gradients = _compiled(read), _compiled(gradients)

    def compute(states, table=table):
        results, normalizers = read(states, table)

        def gradient(*args, upstream=None):  # PyTorch passes it by name.
            upstream = args[0] if upstream is None else upstream
            found = gradients(states, table, normalizers, upstream[:, 0])
            return found if learn_table else found[0]

        return results, gradient

    arguments = (states, table) if learn_table else (states,)
    results = ops.custom_gradient(compute)(*arguments)
    return tuple(results[:, i] for i in range(3))


def _rows(table, part, step, shards=1):
    """Rows of a part of a table, `(shards * step, D)`: as many from each shard."""
    width = table.shape[1]
    if shards == 1:
        return ops.slice(table, (part * step, 0), (step, width))
    table = ops.reshape(table, (shards, -1, width))
    rows = ops.slice(table, (0, part * step, 0), (shards, step, width))
    return ops.reshape(rows, (-1, width))


def _ids(part, step, size, shards):
    """The ids of the rows of `_rows`."""
    ids = part * step + ops.arange(step, dtype="int32")
    if shards == 1:
        return ids
    first = ops.arange(0, size, size // shards, dtype="int32")
    return ops.reshape(first[:, None] + ids[None], (-1,))


def _logits(states, rows, cap):
    """float32 `(N, rows)`, soft-capped."""
    logits = ops.cast(ops.matmul(states, ops.transpose(rows)), "float32")
    return logits if cap is None else ops.tanh(logits / cap) * cap


def _add_mass(sums, logits):
    """A running `logsumexp`.

    Args:
        sums: `(largest logit, sum of exp(logit - largest))` so far, `(N,)` each.
        logits: more of them, `(N, step)`.

    Returns:
        `(sums, factor on what was summed before, exp(logits - largest))`.
    """
    largest, mass = sums
    new = ops.maximum(largest, ops.max(logits, axis=1))
    kept, more = ops.exp(largest - new), ops.exp(logits - new[:, None])
    return (new, mass * kept + ops.sum(more, axis=1)), kept, more


def _chosen(states, table, teacher, cap, i):
    """Every token's i-th choice of its teacher: ids, shares, rows and logits."""
    ids, shares = (ops.take(x, i, axis=1) for x in (teacher.ids, teacher.shares))
    rows = ops.take(table, ids, axis=0)
    logits = ops.sum(ops.cast(states, "float32") * ops.cast(rows, "float32"), axis=1)
    logits = logits if cap is None else ops.tanh(logits / cap) * cap
    return ids, shares, rows, logits


def _expected_logits(states, table, teacher, cap):
    """Means of the logits under the teacher's few choices, `(N,)`."""

    def add(i, total):
        _, shares, _, logits = _chosen(states, table, teacher, cap, i)
        return total + shares * logits

    zeros = ops.zeros_like(states[:, 0], dtype="float32")
    return _loop(teacher.ids.shape[1], add, zeros)


def _pull(states, table, teacher, cap, scale, found, learn_table):
    """Gradients by states and table, with those of `- scale * _expected_logits`."""

    def add(i, found):
        by_states, by_table = found
        ids, shares, rows, logits = _chosen(states, table, teacher, cap, i)
        slope = -scale * shares
        if cap is not None:
            slope = slope * (1 - ops.square(logits / cap))
        by_states = by_states + slope[:, None] * ops.cast(rows, "float32")
        if learn_table:
            rows = slope[:, None] * ops.cast(states, "float32")
            by_table = _add_rows(by_table, ids, ops.cast(rows, by_table.dtype))
        return by_states, by_table

    return _loop(teacher.ids.shape[1], add, found)


def top_choices(states, table, cap, count):
    """The largest logits of each token, in parts of the vocabulary.

    Args:
        states: `(N, E)`.
        table: `(V, E)`.
        cap: soft cap on the logits, or `None`.
        count: how many, K.

    Returns:
        `(ids, log_probs)`, int32 and float32 `(N, K)`, the most likely first.
    """
    size, _ = table.shape
    # Every part is sorted: few large ones, and none that is smaller than the choice.
    parts = _parts(size, states.shape[0], LOGITS_ON_ACCELERATOR)
    while size // parts < count:
        parts //= 2
    step = size // parts

    def find(states, table):
        def add(part, found):
            values, ids, sums = found
            logits = _logits(states, _rows(table, part, step), cap)
            sums, _, _ = _add_mass(sums, logits)
            new, places = ops.top_k(logits, count)
            ids = ops.concatenate([ids, ops.cast(places, "int32") + part * step], 1)
            values, places = ops.top_k(ops.concatenate([values, new], 1), count)
            return values, ops.take_along_axis(ids, places, axis=1), sums

        zeros = ops.zeros_like(states[:, 0], dtype="float32")
        few = ops.tile(zeros[:, None], (1, count))
        start = (few - 1e30, ops.cast(few, "int32"), (zeros - 1e30, zeros))
        values, ids, (largest, mass) = _loop(parts, add, start)
        return ids, values - (largest + ops.log(mass))[:, None]

    return _compiled(find)(states, table)


def _logits_at_once(states):
    """What a CPU's cache holds (4 MiB of float32), or what fills a GPU; on each."""
    if keras.config.backend() == "torch":
        on_cpu = states.device.type == "cpu"
    elif keras.config.backend() == "jax":
        import jax

        on_cpu = jax.default_backend() == "cpu"
    else:
        import tensorflow as tf

        on_cpu = not tf.config.list_logical_devices("GPU")
    return LOGITS_ON_CPU if on_cpu else LOGITS_ON_ACCELERATOR


def _parts(size, tokens, at_once):
    tokens = tokens or 2**11  # Unknown while a TensorFlow function is traced.
    tokens = ceil_div(tokens, mesh.size("data"))
    return vocabulary_chunks(size, tokens, at_once, mesh.pieces_of_width())


def _compiled(function):
    """By XLA where Keras is TensorFlow: on a CPU its other kernels take twice as long.

    Keras itself asks for XLA on JAX, and on TensorFlow only where there is a GPU.
    """
    if keras.config.backend() != "tensorflow":
        return function
    import tensorflow as tf

    return tf.function(function, jit_compile=True, autograph=False)


def _loop(count, body, state):
    if keras.config.backend() == "torch":  # Where it is a loop anyway.
        for i in range(count):
            state = body(i, state)
        return state
    return ops.fori_loop(0, count, body, state)


def _write(array, start, rows, shards=1):
    """`rows` into `array` at row `start`; in place where nobody else does it."""
    if keras.config.backend() == "torch":
        array[start : start + len(rows)] = rows
        return array
    if shards == 1:
        return ops.slice_update(array, (start, 0), rows)
    pieces, rows = (ops.reshape(x, (shards, -1, x.shape[1])) for x in (array, rows))
    return ops.reshape(ops.slice_update(pieces, (0, start, 0), rows), array.shape)


def _add_rows(array, ids, rows):
    """Each of `rows` onto the row of `array` that its id names."""
    if keras.config.backend() == "torch":
        return array.index_add_(0, ids, rows)
    return ops.scatter_update(array, ids[:, None], rows, reduction="add")

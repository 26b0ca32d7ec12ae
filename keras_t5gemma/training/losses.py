"""The training loss, without the logits.

The `(tokens, 256000)` logits are the largest array of a plain training step, several
times. Here they exist part by part, a slice of the vocabulary at a time, in the
forward pass and again, computed anew, in the backward pass.
"""

import math

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class TokenCrossEntropy(keras.losses.Loss):
    """Cross-entropy of the next token, the mean over the tokens that have weight.

    `Seq2SeqLM.fit` and `evaluate` compute it by `token_losses`, without the logits;
    on logits, anywhere else in Keras, it is the same function.

    Args:
        label_smoothing: share of the target spread over the vocabulary, in `[0, 1)`.
        z_loss: weight of the squared log-normaliser, at least 0; 1e-4 is usual.
        reduction: of `keras.losses.Loss`; another than the default needs the logits.
        name: of the loss.
        dtype: of `keras.losses.Loss`.

    Raises:
        ValueError: for a number out of its range.
    """

    def __init__(
        self,
        label_smoothing=0.0,
        z_loss=0.0,
        reduction="mean_with_sample_weight",
        name="token_cross_entropy",
        dtype=None,
    ):
        numbers = int | float
        if not isinstance(label_smoothing, numbers) or not 0 <= label_smoothing < 1:
            raise ValueError(
                f"`label_smoothing` must be in [0, 1); got {label_smoothing!r}."
            )
        if not isinstance(z_loss, numbers) or not z_loss >= 0:
            raise ValueError(f"`z_loss` must be at least 0; got {z_loss!r}.")
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss

    def call(self, y_true, y_pred):
        """Losses `(B, T)` of labels `(B, T)`, from logits `(B, T, V)`."""
        labels = ops.cast(y_true, "int32")[..., None]
        normaliser = ops.logsumexp(y_pred, axis=-1)
        chosen = ops.take_along_axis(y_pred, labels, axis=-1)[..., 0]
        losses = normaliser - (1 - self.label_smoothing) * chosen
        losses = losses - self.label_smoothing * ops.mean(y_pred, axis=-1)
        return losses + self.z_loss * ops.square(normaliser)

    def get_config(self):
        return {
            **super().get_config(),
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
        }


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class Perplexity(keras.metrics.Mean):
    """`exp` of the mean negative log-probability of all tokens so far."""

    def __init__(self, name="perplexity", dtype=None):
        super().__init__(name=name, dtype=dtype)

    def result(self):
        return ops.exp(super().result())


def token_losses(
    states, table, labels, cap=None, label_smoothing=0.0, z_loss=0.0, learn_table=True
):
    """Cross-entropy of each label, from the decoder's states.

    With logits `l`, soft-capped, of V classes and `Z = logsumexp(l)`, a label y costs
    `(1 - e) (Z - l_y) + e (Z - mean(l)) + z Z^2` with label smoothing e
    (arXiv 1512.00567) and the z-loss of arXiv 2204.02311.

    Args:
        states: `(N, D)`, N tokens.
        table: logit table `(V, D)`, of the dtype of the states.
        labels: int `(N,)`, in `[0, V)`.
        cap: soft cap on the logits, or `None`.
        label_smoothing: e, share of the target spread over the vocabulary.
        z_loss: z, weight of the squared log-normaliser; 1e-4 is usual.
        learn_table: `False` computes no gradient by the table.

    Returns:
        `(losses, log_probs, hits)`, float32 `(N,)` each: the losses, which alone can be
        differentiated, by states and table; the labels' log-probabilities; and 1 where
        no other logit is above the label's.
    """
    size, width = table.shape
    parts = _parts(size, states.shape[0], _logits_at_once(states))
    step = size // parts
    labels = ops.cast(labels, "int32")

    def logits_of(states, table, part):
        rows = ops.slice(table, (part * step, 0), (step, width))
        logits = ops.matmul(states, ops.transpose(rows))  # N step
        logits = ops.cast(logits, "float32")
        return rows, logits if cap is None else ops.tanh(logits / cap) * cap

    def is_label(labels, part):
        return labels[:, None] == part * step + ops.arange(step, dtype="int32")[None]

    def read(states, table):
        def add(part, sums):
            largest, mass, total, chosen = sums
            _, logits = logits_of(states, table, part)
            new = ops.maximum(largest, ops.max(logits, axis=1))
            mass = mass * ops.exp(largest - new)
            mass = mass + ops.sum(ops.exp(logits - new[:, None]), axis=1)
            mine = ops.where(is_label(labels, part), logits, 0.0)
            chosen = chosen + ops.sum(mine, axis=1)
            return new, mass, total + ops.sum(logits, axis=1), chosen

        zeros = ops.zeros_like(states[:, 0], dtype="float32")
        start = (zeros - 1e30, zeros, zeros, zeros)
        largest, mass, total, chosen = _loop(parts, add, start)
        normaliser = largest + ops.log(mass)  # N
        losses = normaliser - (1 - label_smoothing) * chosen
        losses = losses - label_smoothing * total / size
        losses = losses + z_loss * ops.square(normaliser)
        hits = ops.cast(chosen >= largest, "float32")
        return ops.stack([losses, chosen - normaliser, hits], axis=1), normaliser

    def gradients(states, table, normaliser, upstream):
        scale = upstream * (1 + 2 * z_loss * normaliser)

        def add(part, sums):
            by_states, by_table = sums
            rows, logits = logits_of(states, table, part)
            slope = scale[:, None] * ops.exp(logits - normaliser[:, None])
            target = ops.where(is_label(labels, part), 1 - label_smoothing, 0.0)
            target = target + label_smoothing / size
            slope = slope - upstream[:, None] * target
            if cap is not None:
                slope = slope * (1 - ops.square(logits / cap))
            slope = ops.cast(slope, states.dtype)
            new = ops.cast(ops.matmul(slope, rows), "float32")
            if learn_table:
                by_rows = ops.matmul(ops.transpose(slope), states)
                by_table = _write(by_table, part * step, by_rows)
            return by_states + new, by_table

        # Every row is written. Ones, not zeros: XLA would keep one table of zeros for
        # this and for the gradient of an embedding, through the whole backward pass.
        by_table = ops.ones_like(table) if learn_table else ops.zeros((0,))
        start = (ops.zeros_like(states, dtype="float32"), by_table)
        by_states, by_table = _loop(parts, add, start)
        return ops.cast(by_states, states.dtype), by_table

    read, gradients = _compiled(read), _compiled(gradients)

    def compute(states, table=table):
        results, normaliser = read(states, table)

        def gradient(*args, upstream=None):  # PyTorch passes it by name.
            upstream = args[0] if upstream is None else upstream
            found = gradients(states, table, normaliser, upstream[:, 0])
            return found if learn_table else found[0]

        return results, gradient

    arguments = (states, table) if learn_table else (states,)
    results = ops.custom_gradient(compute)(*arguments)
    return tuple(results[:, i] for i in range(3))


def _logits_at_once(states):
    """What a CPU's cache holds (4 MiB of float32), or what fills a GPU."""
    if keras.config.backend() == "torch":
        on_cpu = states.device.type == "cpu"
    elif keras.config.backend() == "jax":
        import jax

        on_cpu = jax.default_backend() == "cpu"
    else:
        import tensorflow as tf

        on_cpu = not tf.config.list_logical_devices("GPU")
    return 2**20 if on_cpu else 2**24


def _parts(size, tokens, at_once):
    """Into how many equal parts to cut a vocabulary: a power of two, if it can be."""
    tokens = tokens or 2**11  # Unknown while a TensorFlow function is traced.
    wanted = 1 << max(0, (tokens * size - 1) // at_once).bit_length()
    return math.gcd(size, wanted)


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


def _write(array, start, rows):
    """`rows` into `array` at row `start`; in place where nobody else does it."""
    if keras.config.backend() == "torch":
        array[start : start + len(rows)] = rows
        return array
    return ops.slice_update(array, (start, 0), rows)

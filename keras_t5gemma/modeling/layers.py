"""The parts of a block that look at one token at a time."""

import keras
from keras import ops


def soft_cap(x, cap):
    """`cap * tanh(x / cap)`: about `x` when small, never beyond +-`cap`."""
    return x if cap is None else ops.tanh(x / cap) * cap


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class RMSNorm(keras.layers.Layer):
    """`x / rms(x) * (1 + scale)` in float32, scale starting at zero.

    Args:
        epsilon: added to the mean square.
    """

    def __init__(self, epsilon=1e-6, **kwargs):
        # No autocast: input and scale are lifted to float32 from what they are.
        super().__init__(autocast=False, **kwargs)
        self.epsilon = epsilon

    def build(self, input_shape):
        self.scale = self.add_weight(
            name="scale", shape=(input_shape[-1],), initializer="zeros"
        )

    def call(self, x):
        y = ops.cast(x, "float32")
        y = y * ops.rsqrt(ops.mean(ops.square(y), -1, keepdims=True) + self.epsilon)
        y = y * (1.0 + ops.cast(self.scale, "float32"))
        return ops.cast(y, x.dtype)

    def get_config(self):
        return {**super().get_config(), "epsilon": self.epsilon}


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class TokenEmbedding(keras.layers.ReversibleEmbedding):
    """Keras's embedding and logit table; int8 quantises its weights alone.

    With Keras's quantised activations the gradient through the int8 logits points
    nowhere (its cosine to float32's is about 0), and LoRA learns nothing.
    """

    def quantize(self, mode=None, type_check=True, config=None):
        super().quantize(mode, type_check=False, config=config)

    def _int8_build(self, embeddings_shape, config=None):
        super()._int8_build(embeddings_shape, config)
        self.inputs_quantizer = None


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class GatedMLP(keras.layers.Layer):
    """GeGLU feed-forward: `down(gelu(gate(x)) * up(x))`, no biases.

    Args:
        hidden_dim: D, the width coming in and going out.
        intermediate_dim: F.
    """

    def __init__(self, hidden_dim, intermediate_dim, **kwargs):
        super().__init__(**kwargs)
        self.hidden_dim = hidden_dim
        self.intermediate_dim = intermediate_dim
        self.gate = self._dense(intermediate_dim, "gate")
        self.up = self._dense(intermediate_dim, "up")
        self.down = self._dense(hidden_dim, "down")

    def _dense(self, units, name):
        return dense(units, name, self.dtype_policy)

    def build(self, input_shape):
        self.gate.build(input_shape)
        self.up.build(input_shape)
        self.down.build((*input_shape[:-1], self.intermediate_dim))

    def call(self, x):
        return self.down(ops.gelu(self.gate(x), approximate=True) * self.up(x))

    def get_config(self):
        return {
            **super().get_config(),
            "hidden_dim": self.hidden_dim,
            "intermediate_dim": self.intermediate_dim,
        }


def dense(units, name, dtype):
    """A projection without bias, initialised as Gemma's: normal, sd 0.02."""
    return keras.layers.Dense(
        units,
        use_bias=False,
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.02),
        name=name,
        dtype=dtype,
    )

"""Layers that act on each token alone: norms, embeddings, projections, feed-forward."""

import math
from typing import Any

import keras
from keras import ops

from keras_t5gemma.modeling.float_products import matmul
from keras_t5gemma.modeling.gated_gelu import gated_gelu
from keras_t5gemma.modeling.int8_products import int8_product, is_fast
from keras_t5gemma.modeling.rms_norm import rms_norm
from keras_t5gemma.modeling.soft_cap import soft_cap
from keras_t5gemma.utils.types import Tensor


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class RMSNorm(keras.layers.Layer):
    """Gemma's RMSNorm: `x / rms(x) * (1 + scale)` in float32; scale starts at 0.

    Args:
        epsilon: added to the mean square.
    """

    def __init__(self, epsilon: float = 1e-6, **kwargs: Any):
        # No autocast: input and scale are cast to float32 without rounding before.
        super().__init__(autocast=False, **kwargs)
        self.epsilon = epsilon

    def build(self, input_shape):
        self.scale = self.add_weight(
            name="scale", shape=(input_shape[-1],), initializer="zeros"
        )

    def call(self, x):
        return rms_norm(x, self.scale, self.epsilon)

    def get_config(self):
        return {**super().get_config(), "epsilon": self.epsilon}


def stored_weight(layer, name):
    """A variable of a layer by its name, where the property adds adapters to it."""
    return next(v for v in layer.variables if v.name == name)


class _FreshAdapters:
    """Mixin of a layer with adapters: they go on learning after `load_weights`.

    `save_weights` of Keras merges adapters, and `load_weights` sets both factors to
    zero, so that neither has a gradient any more.
    """

    def load_own_variables(self, store):
        super().load_own_variables(store)
        if self.lora_enabled:
            first = next(v for v in self.variables if v.name.startswith("lora_"))
            first.assign(keras.initializers.HeUniform()(first.shape, first.dtype))


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class TokenEmbedding(_FreshAdapters, keras.layers.ReversibleEmbedding):
    """Token embedding, tied to the logits; int8 quantizes the weights only.

    Keras also quantizes the activations: the gradient through its int8 logits has a
    cosine of about 0 to that of float32, and LoRA learns nothing. Generation rounds
    them where that is faster, see `int8_products`.
    """

    def quantize(self, mode=None, type_check=True, config=None):
        super().quantize(mode, type_check=False, config=config)

    def quantized_call(self, inputs, reverse=False):
        if not reverse:  # Keras's scale is float32, and so would its result be.
            states = super().quantized_call(inputs, reverse=False)
            return ops.cast(states, self.compute_dtype)
        if self.quantization_mode != "int8":
            return super().quantized_call(inputs, reverse=True)
        table = ops.cast(stored_weight(self, "embeddings"), self.compute_dtype)
        logits = matmul(inputs, ops.transpose(table)) / self.embeddings_scale
        return soft_cap(ops.cast(logits, self.compute_dtype), self.logit_soft_cap)

    def int8_logits(self, states: Tensor) -> Tensor:
        """Logits `(B, V)` of states `(B, D)`, for generation, without the soft cap.

        In floats it is computed in chunks of the table, so that XLA never dequantizes
        all of it: a chunk of at most 8 MiB stays in the processor's cache.
        """
        table = stored_weight(self, "embeddings")
        if is_fast(states):
            return int8_product(
                states, table.value, self.embeddings_scale.value, axis=1
            )
        size, width = table.shape
        parts = math.gcd(size, 1 << (size * width // 2**21).bit_length())
        table = ops.reshape(table, (parts, size // parts, width))
        columns = ops.transpose(states)  # D B

        def product(part):
            return ops.matmul(ops.cast(part, self.compute_dtype), columns)

        logits = ops.reshape(ops.map(product, table), (size, -1))
        scale = ops.reshape(self.embeddings_scale, (size, 1))
        return ops.transpose(ops.cast(logits / scale, self.compute_dtype))


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class Projection(_FreshAdapters, keras.layers.Dense):
    """Dense layer without bias; int8 quantizes the weights only.

    They are dequantized for a float product: inputs and gradients stay exact.
    Inference rounds the inputs where that is faster, see `int8_products`.
    """

    def quantize(self, mode=None, type_check=True, config=None):
        super().quantize(mode, type_check=False, config=config)

    def call(self, inputs, training=None):
        return matmul(inputs, self.kernel)

    def quantized_call(self, inputs, training=None):
        if self.quantization_mode != "int8":
            return super().quantized_call(inputs, training=training)
        kernel = stored_weight(self, "kernel")
        if is_fast(inputs):
            x = int8_product(inputs, kernel.value, self.kernel_scale.value, axis=0)
        else:
            kernel = ops.cast(kernel, self.compute_dtype)
            kernel = kernel / ops.cast(self.kernel_scale, self.compute_dtype)
            x = matmul(inputs, kernel)
        if self.lora_enabled:
            update = ops.matmul(inputs, self.lora_kernel_a)
            update = ops.matmul(update, self.lora_kernel_b)
            x = x + ops.cast(self.lora_alpha / self.lora_rank * update, x.dtype)
        return x


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class GatedMLP(keras.layers.Layer):
    """GeGLU feed-forward: `down(gelu(gate(x)) * up(x))`, no biases.

    Args:
        hidden_dim: D, width of input and output.
        intermediate_dim: F.
    """

    def __init__(self, hidden_dim: int, intermediate_dim: int, **kwargs: Any):
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
        return self.down(gated_gelu(self.gate(x), self.up(x)))

    def get_config(self):
        return {
            **super().get_config(),
            "hidden_dim": self.hidden_dim,
            "intermediate_dim": self.intermediate_dim,
        }


def dense(units: int, name: str, dtype: Any) -> Projection:
    """A projection without bias, initialized like Gemma's: normal, std 0.02."""
    return Projection(
        units,
        use_bias=False,
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.02),
        name=name,
        dtype=dtype,
    )

"""Memory of a model that reads one text and writes an answer."""

import dataclasses

from keras_t5gemma.config import StackConfig, T5GemmaConfig
from keras_t5gemma.planning.abstract_variables import model_variables
from keras_t5gemma.planning.activations import Shape, cache_bytes

# Name: data type of the other weights and of the states, quantization.
DTYPES = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "int8": ("bfloat16", "int8"),
    "int4": ("bfloat16", "int4"),
}
CARD = 24 * 10**9
_RESERVE = 0.08  # Share of a card that the driver and the libraries take.


@dataclasses.dataclass(frozen=True)
class Inference:
    """Bytes on one device.

    Args:
        weights: of the model.
        caches: keys and values of the decoder.
        states: activations of a block of the encoder.
    """

    weights: int
    caches: int
    states: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.caches + self.states

    def fits(self, memory: int = CARD) -> bool:
        """Whether it fits a device with so many bytes."""
        return self.total < (1 - _RESERVE) * memory


def inference_memory(
    config: T5GemmaConfig, source: int, target: int
) -> dict[str, Inference]:
    """Memory to generate for one text, by the name of a data type.

    Args:
        config: of the model; without a decoder nothing is generated.
        source: tokens read.
        target: tokens written.

    Returns:
        For each of `DTYPES` an `Inference`.
    """
    found = {}
    for name, (dtype, mode) in DTYPES.items():
        size = 2 if dtype == "bfloat16" else 4
        weights = sum(v.nbytes for v in model_variables(config, dtype, None, mode))
        caches = int(cache_bytes(config, Shape(1, source, target, size)))
        states = size * source * _widths(config.encoder)
        found[name] = Inference(weights, caches, states)
    return found


def _widths(stack: StackConfig) -> int:
    """Floats a token of the feed-forward layer and of the residual stream."""
    return 3 * stack.intermediate_dim + 5 * stack.hidden_dim

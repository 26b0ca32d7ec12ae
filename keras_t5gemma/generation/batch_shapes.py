"""Array shapes of batches, chosen by compilation time and padded work.

A program is compiled for each shape. A batch may use the program of a larger shape
instead, which pads it: that is cheaper where the padded work takes less time than
compiling, as with a small model or few texts. Times are estimates within a factor of
about 2, from the sizes of the model alone, so that all processes choose the same.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

from keras_t5gemma.config import StackConfig
from keras_t5gemma.generation.options import GenerationOptions
from keras_t5gemma.utils.backends import on_cpu

# Rows, tokens of the sources, tokens of the common prefix of the prompts.
Shape = tuple[int, int, int]

_RATES = {True: 5e10, False: 5e13}  # Operations a second on CPUs, on accelerators.
_COMPILE_SECONDS, _COMPILE_SECONDS_PER_LAYER = 0.5, 0.2  # Of one program.
# Share of the decoder's work that leaving finished rows behind saves.
_SAVED_BY_SHRINKING = 0.25


@dataclasses.dataclass(frozen=True)
class Costs:
    """Estimated times of one model, in seconds.

    Args:
        encoder_token: to read a token of a source.
        decoder_row: to generate the longest answers to one source.
        encoder_program: to compile the program that reads the sources.
        decoder_program: to compile the program that generates.
    """

    encoder_token: float
    decoder_row: float
    encoder_program: float
    decoder_program: float

    def of_batch(self, shape: Shape) -> float:
        """Time to generate for a batch."""
        rows, length, _ = shape
        return rows * (length * self.encoder_token + self.decoder_row)

    def shared_shapes(self, shapes: Iterable[Shape]) -> dict[Shape, Shape]:
        """Which of its batches' shapes a request uses.

        Args:
            shapes: the smallest shape of each batch.

        Returns:
            For each different shape the one to use instead of it, or itself.
        """
        shapes = list(shapes)
        counts = Counter(shapes)
        used = {shape: shape for shape in counts}
        program = self.encoder_program + self.decoder_program
        while True:
            gains = [
                (program - counts[small] * added, small, large)
                for small in counts
                for large in counts
                if small != large and _contains(large, small)
                for added in [self.of_batch(large) - self.of_batch(small)]
            ]
            if not gains or max(gains)[0] <= 0:
                return used
            _, small, large = max(gains)
            counts[large] += counts.pop(small)
            used = {a: large if b == small else b for a, b in used.items()}

    def shrinking_pays(self, rows: int, batches: int) -> bool:
        """Whether to compile programs for fewer rows, for when some are finished.

        Args:
            rows: sources in a batch.
            batches: number of batches of this shape.
        """
        saved = _SAVED_BY_SHRINKING * batches * rows * self.decoder_row
        return saved > (rows - 1).bit_length() * self.decoder_program


def _contains(large, small):
    """Whether a batch can be padded; one without a prefix reads none."""
    fits = all(a >= b for a, b in zip(large, small, strict=True))
    return fits and bool(large[2]) == bool(small[2])


def estimated_costs(backbone: Any, options: GenerationOptions, width: int) -> Costs:
    """The `Costs` of generating with a model.

    Args:
        backbone: a `Backbone`.
        options: a `GenerationOptions`.
        width: length of the decoder's arrays.
    """
    config = backbone.config
    rate = _RATES[on_cpu(backbone.variables[0])]
    encoder, decoder = config.encoder, config.decoder
    table = config.vocabulary_size * decoder.hidden_dim
    decoder_token = 2 * (_weights(decoder, attentions=2) + table)
    layers = [stack.num_layers for stack in (encoder, decoder)]
    programs = [_COMPILE_SECONDS + _COMPILE_SECONDS_PER_LAYER * n for n in layers]
    return Costs(
        2 * _weights(encoder) / rate,
        options.rows_per_source * width * decoder_token / rate,
        *programs,
    )


def _weights(stack: StackConfig, attentions: int = 1) -> int:
    """Weights that a token is multiplied with in the blocks of a tower."""
    heads = 2 * stack.num_query_heads + 2 * stack.num_key_value_heads
    attention = stack.hidden_dim * heads * stack.head_dim
    mlp = 3 * stack.hidden_dim * stack.intermediate_dim
    return stack.num_layers * (attentions * attention + mlp)

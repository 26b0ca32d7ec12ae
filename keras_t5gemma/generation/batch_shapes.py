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
        counts = Counter(shapes)
        used = {shape: shape for shape in counts}
        program = self.encoder_program + self.decoder_program
        # The shapes that each could be padded to; the cheapest is last.
        others = {
            small: sorted(
                (
                    large
                    for large in counts
                    if large != small and _contains(large, small)
                ),
                key=lambda shape: (-self.of_batch(shape), shape),
            )
            for small in counts
        }
        while True:
            gains = []
            for small, larger in others.items():
                while larger and larger[-1] not in counts:
                    larger.pop()
                if small in counts and larger:
                    added = self.of_batch(larger[-1]) - self.of_batch(small)
                    gain = program - counts[small] * added
                    gains.append((gain, small, larger[-1]))
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
    layers = [stack.num_layers for stack in (config.encoder, config.decoder)]
    programs = [_COMPILE_SECONDS + _COMPILE_SECONDS_PER_LAYER * n for n in layers]
    return Costs(
        2 * _weights(config.encoder) / rate,
        options.rows_per_source * width * decoder_token_seconds(backbone),
        *programs,
    )


def decoder_token_seconds(backbone: Any) -> float:
    """Estimated time of the decoder's arithmetic for one token of a row.

    Args:
        backbone: a `Backbone`.
    """
    decoder = backbone.config.decoder
    table = backbone.config.vocabulary_size * decoder.hidden_dim
    operations = 2 * (_weights(decoder, attentions=2) + table)
    return operations / _RATES[on_cpu(backbone.variables[0])]


def _weights(stack: StackConfig, attentions: int = 1) -> int:
    """Weights that a token is multiplied with in the blocks of a tower."""
    heads = 2 * stack.num_query_heads + 2 * stack.num_key_value_heads
    attention = stack.hidden_dim * heads * stack.head_dim
    mlp = 3 * stack.hidden_dim * stack.intermediate_dim
    return stack.num_layers * (attentions * attention + mlp)

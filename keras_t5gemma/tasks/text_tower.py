"""Text tower: a frozen or trained encoder in front of another model.

B batch, T length, D width.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_t5gemma.modeling.backbone import Backbone
from keras_t5gemma.modeling.encoder_states import (
    check_final_norm,
    encoder_states,
    layer_numbers,
)
from keras_t5gemma.modeling.trainability import warn_of_adapters
from keras_t5gemma.modeling.weight_loading import normal_tensors
from keras_t5gemma.tasks.encoder_loading import load_encoder
from keras_t5gemma.tasks.hidden_states import padding_mask, token_rows
from keras_t5gemma.tokenization.compatibility import check_preprocessor
from keras_t5gemma.tokenization.token_ids import pad
from keras_t5gemma.utils.checks import flag
from keras_t5gemma.utils.types import Tensor


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class TextTower(keras.layers.Layer):
    """Text encoder as a layer, e.g. of an image, audio or video generator.

    Call it on token ids and a padding mask, `tower(*tower.tokenize(texts, pad_to=64))`,
    or inside the `call` of a model, which is compiled, trained and saved with it. The
    states are those of `TextEmbedder.hidden_states`.

    Args:
        backbone: a `Backbone` without a decoder; `from_preset` loads it.
        preprocessor: a `Seq2SeqLMPreprocessor` for `tokenize`, or `None`.
        layers: one layer or a list of them; see `TextEmbedder.hidden_states`.
        final_norm: see `TextEmbedder.hidden_states`.
        trainable: `False` freezes the backbone and turns its dropout off; `True` leaves
            it as it is, e.g. with adapters of `backbone.enable_lora`, which a saved
            model has merged into its weights.
        **kwargs: `name`, and `dtype`, whose compute dtype the states get; by default
            that of the backbone.

    Raises:
        ValueError: for a backbone with a decoder, a layer that does not exist, or a
            tokenizer that does not fit.
    """

    def __init__(
        self,
        backbone: Any,
        preprocessor: Any = None,
        layers: int | Sequence[int] = -1,
        final_norm: bool | None = None,
        trainable: bool = False,
        **kwargs: Any,
    ) -> None:
        if not isinstance(backbone, Backbone) or backbone.decoder is not None:
            raise ValueError(
                "`backbone` must be an encoder alone: load it with "
                f"Backbone.from_preset(..., encoder_only=True); got {backbone!r:.100}."
            )
        numbers = layer_numbers(layers, len(backbone.encoder.blocks))
        if preprocessor is not None:
            size = backbone.config.vocabulary_size
            check_preprocessor(preprocessor, "TextTower", size)
        if kwargs.get("dtype") is None:
            kwargs["dtype"] = backbone.encoder.compute_dtype
        super().__init__(autocast=False, **kwargs)
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.selected_layers = (
            list(layers) if isinstance(layers, Sequence) else int(layers)
        )
        self.final_norm = check_final_norm(final_norm)
        self._numbers = numbers
        if not flag(trainable, "trainable"):
            self.trainable = False
        self.built = True

    @classmethod
    @normal_tensors()
    def from_preset(
        cls, preset: Any, load_weights: bool = True, **kwargs: Any
    ) -> "TextTower":
        """Load the encoder of a checkpoint; the decoder is not read.

        Args:
            preset: see `TextEmbedder.from_preset`.
            load_weights: `False` leaves the weights random.
            **kwargs: `dtype`, `verify_checksums`, `allow_non_finite` (see
                `Backbone.from_preset`), and further arguments of the class.

        Returns:
            A `TextTower`.

        Raises:
            ValueError: for an unknown preset, or files that do not fit, named.
            OSError: when a download fails, with what to do.
        """
        _, backbone, _ = load_encoder(preset, load_weights, kwargs)
        return cls(backbone, **kwargs)

    def tokenize(
        self, texts: Sequence[str], pad_to: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and padding mask of texts, for `call`.

        Args:
            texts: a list of strings; `""` is a row of padding.
            pad_to: number of tokens that every text is padded to on the right, or
                truncated to; `None` is the length of the longest text. A fixed length
                needs one compiled program.

        Returns:
            NumPy int32 and bool `(B, T)`.

        Raises:
            ValueError: as `TextEmbedder.hidden_states`, or without a preprocessor.
        """
        if self.preprocessor is None:
            raise ValueError("TextTower needs a `preprocessor` for text.")
        reader = self.preprocessor.for_reading(self.backbone.config.max_positions)
        rows = token_rows(reader, texts, pad_to)
        width = pad_to or max(map(len, rows), default=0)
        return pad(rows, width)[0], padding_mask(rows, width)

    def call(
        self, token_ids: Tensor, padding_mask: Tensor, training: bool | None = None
    ) -> Any:
        """Hidden states `(B, T, D)`, 0 on padding; a list of them for several layers.

        Args:
            token_ids: int `(B, T)`.
            padding_mask: bool or int `(B, T)`, 0 for padding.
            training: turns dropout on, unless the tower is frozen.
        """
        training = training and self.trainable
        states = encoder_states(
            self.backbone.encoder,
            token_ids,
            padding_mask,
            self._numbers,
            self.final_norm,
            training,
        )
        states = [keras.ops.cast(x, self.compute_dtype) for x in states]
        return states if isinstance(self.selected_layers, list) else states[0]

    def compute_output_spec(
        self, token_ids: Tensor, padding_mask: Tensor, training: bool | None = None
    ) -> Any:
        shape = *token_ids.shape, self.backbone.encoder.stack.hidden_dim
        specs = [keras.KerasTensor(shape, self.compute_dtype) for _ in self._numbers]
        return specs if isinstance(self.selected_layers, list) else specs[0]

    @classmethod
    def from_config(cls, config: dict) -> "TextTower":
        """Make a tower from the dict of `get_config`."""
        config = dict(config)
        for name in ("backbone", "preprocessor"):
            if isinstance(config[name], dict):
                config[name] = keras.layers.deserialize(config[name])
        return cls(**config)

    def get_config(self) -> dict:
        warn_of_adapters(self, "Saving a model with a `TextTower` merges")
        parts = {"backbone": self.backbone, "preprocessor": self.preprocessor}
        return {
            **super().get_config(),
            **{k: v and keras.layers.serialize(v) for k, v in parts.items()},
            "layers": self.selected_layers,
            "final_norm": self.final_norm,
        }

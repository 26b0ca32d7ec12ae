"""Changes of a task's backbone in place: adapters (LoRA) and quantization."""

from typing import Any

from keras_t5gemma._compat import track_parameters
from keras_t5gemma.modeling.trainability import KeepsTrainability
from keras_t5gemma.utils.checks import path


class ChangesBackbone(KeepsTrainability):
    """Mixin of a task: changes its `Backbone`, and forgets what was compiled before."""

    backbone: Any
    compiled: bool

    def get_config(self) -> dict:
        config = super().get_config()
        return config if self.compiled else {**config, "compile": False}

    def enable_lora(
        self,
        rank: int,
        target_layer_names: list[str] | None = None,
        parts: list[str] | None = None,
    ) -> None:
        """Freeze the model and train low-rank adapters (arXiv 2106.09685).

        `save_to_preset` merges them into the weights, `save_lora_weights` saves only
        the adapters. On a quantized model they are trained on top of its int8 weights.

        Args:
            rank: inner size of the adapters, at least 1.
            target_layer_names: names of the layers: query, key, value, output, gate,
                up, down, token_embedding. `None` is query and value in attention,
                and all three in the feed-forward layers if they are among the parts.
            parts: a list among `"encoder"` and `"decoder"` (their self-attention),
                `"cross_attention"`, `"mlp"` (of both) and `"embeddings"`. `None` is all
                attention.

        Raises:
            ValueError: for a rank below 1, or names that match no layer.
        """
        self.backbone.enable_lora(rank, target_layer_names, parts)
        self._forget_compiled()

    def save_lora_weights(self, filepath: Any) -> None:
        """Save only the adapters, without the head of a `TextClassifier`.

        Args:
            filepath: path in `.lora.h5`; or of a folder for the `peft` library, which
                applies it to transformers' T5Gemma.

        Raises:
            ValueError: without adapters, for another suffix, or adapters that PEFT does
                not have.
        """
        self.backbone.save_lora_weights(path(filepath, "filepath"))

    def load_lora_weights(self, filepath: Any) -> None:
        """Load adapters into the layers that they were saved from.

        Args:
            filepath: what `save_lora_weights` wrote, or a folder of the `peft` library.

        Raises:
            ValueError: for adapters that do not fit the model.
        """
        self.backbone.load_lora_weights(path(filepath, "filepath"))
        self._forget_compiled()

    def quantize(self, mode: str | None = None, **kwargs: Any) -> None:
        """Quantize the backbone in place.

        Args:
            mode: `"int8"`, `"int4"`, or another mode of `Backbone.quantize`.
            **kwargs: see `Backbone.quantize`.

        Raises:
            ValueError: for an unknown mode, or with several processes.
        """
        self.backbone.quantize(mode, **kwargs)
        self._forget_compiled()

    def _forget_compiled(self):
        """Reset compiled functions after a change of the trainable variables."""
        self.generate_function = None
        self.train_function = self.test_function = self.predict_function = None
        track_parameters(self.backbone)
        track_parameters(self)

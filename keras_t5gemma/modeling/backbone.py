"""The network without a task: four arrays in, two hidden sequences out."""

import keras
import keras_hub

from keras_t5gemma.checkpoints import presets
from keras_t5gemma.config import T5GemmaConfig
from keras_t5gemma.modeling.towers import Decoder, Encoder


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class Backbone(keras_hub.models.Backbone):
    """T5Gemma (arXiv 2504.06225): a Gemma 2 that reads, a Gemma 2 that writes.

    Call it on a dict of int32 arrays `encoder_token_ids`,
    `encoder_padding_mask` `(batch, encoder length)`, `decoder_token_ids` and
    `decoder_padding_mask` `(batch, decoder length)`; sequences are padded on
    the right with 0. It returns a dict of `encoder_sequence_output` `(batch,
    encoder length, encoder width)` and `decoder_sequence_output` `(batch,
    decoder length, decoder width)` in the compute dtype.

    Args:
        config: a `T5GemmaConfig`, or its dict.
        dtype: dtype policy or its name, e.g. `"bfloat16"`; `None` takes
            Keras's global policy.

    Raises:
        ValueError: for an inconsistent config; the message names the field.
    """

    def __init__(self, config, dtype=None, **kwargs):
        if isinstance(config, dict):
            config = T5GemmaConfig.from_dict(config)
        if not isinstance(config, T5GemmaConfig):
            raise ValueError(
                "`config` must be a T5GemmaConfig, e.g. "
                f"T5GemmaConfig.pair('s', 's'); got {config!r}."
            )
        dtype = keras.dtype_policies.get(dtype)
        encoder = Encoder(config, dtype=dtype)
        decoder = Decoder(config, dtype=dtype)
        inputs = {
            name: keras.Input((None,), dtype="int32", name=name)
            for name in (
                "encoder_token_ids",
                "encoder_padding_mask",
                "decoder_token_ids",
                "decoder_padding_mask",
            )
        }
        memory = encoder(inputs["encoder_token_ids"], inputs["encoder_padding_mask"])
        hidden = decoder(
            inputs["decoder_token_ids"],
            inputs["decoder_padding_mask"],
            memory,
            inputs["encoder_padding_mask"],
        )
        super().__init__(
            inputs=inputs,
            outputs={
                "encoder_sequence_output": memory,
                "decoder_sequence_output": hidden,
            },
            dtype=dtype,
            **kwargs,
        )
        self.config = config
        self.encoder = encoder
        self.decoder = decoder
        track_parameters(self)

    def encode(self, token_ids, padding_mask, training=False):
        """Encoder states `(batch, length, width)` of int arrays `(batch, length)`."""
        return self.encoder(token_ids, padding_mask, training=training)

    def decode(
        self,
        token_ids,
        padding_mask=None,
        memory=None,
        memory_padding_mask=None,
        cache=None,
        index=None,
        training=False,
    ):
        """Decoder states, of a whole sequence or of the next tokens of a cache.

        Args:
            token_ids: int `(batch, length)`.
            padding_mask: `(batch, length)`; without a cache only.
            memory: encoder states; without a cache only.
            memory_padding_mask: the encoder's padding mask; likewise.
            cache: of `make_cache`, or of the call before.
            index: position of the first of `token_ids`; with a cache only.
            training: turns dropout on; without a cache only.

        Returns:
            States `(batch, length, width)` without a cache; `(states, cache)`
            with one.
        """
        if cache is not None:
            return self.decoder.step(token_ids, cache, index)
        return self.decoder(
            token_ids, padding_mask, memory, memory_padding_mask, training=training
        )

    def make_cache(self, memory, memory_padding_mask, length):
        """An empty decoding cache for up to `length` tokens; see `kv_cache`."""
        return self.decoder.make_cache(memory, memory_padding_mask, length)

    def logits(self, hidden_states):
        """Soft-capped logits `(batch, length, vocabulary)` of decoder states."""
        return self.decoder.logits(hidden_states)

    @property
    def token_embedding(self):
        """The encoder's embedding layer."""
        return self.encoder.token_embedding

    def quantize(self, mode=None, filters=None, **kwargs):
        """Quantise projections and embeddings; see `keras.Model.quantize`."""
        if filters is None:
            filters = _is_projection_or_embedding
        super().quantize(mode, filters=filters, **kwargs)

    def default_lora_layer_names(self):
        """Query and value projections, of self- and cross-attention."""
        return ["query", "value"]

    @classmethod
    def from_preset(cls, preset, load_weights=True, **kwargs):
        """The backbone of a preset.

        Args:
            preset: a name of `keras_t5gemma.presets()`, a local folder, or an
                `hf://` or `kaggle://` handle; our format or transformers'.
            load_weights: `False` leaves the weights random.
            **kwargs: `dtype`, `name`, `trainable`.

        Raises:
            ValueError: for an unknown preset or keyword, or files that do not
                fit, named.
        """
        presets.check_keywords(kwargs, ("dtype", "name", "trainable"), cls.__name__)
        location, kind = presets.resolve(preset)
        if kind == presets.HUGGING_FACE:
            from keras_t5gemma.checkpoints import huggingface

            return huggingface.load_backbone(location, load_weights, **kwargs)
        return super().from_preset(location, load_weights, **kwargs)

    def get_config(self):
        return {**super().get_config(), "config": self.config.to_dict()}


def _is_projection_or_embedding(layer):
    return isinstance(layer, keras.layers.Dense | keras.layers.Embedding)


def track_parameters(model):
    """Let PyTorch see a KerasHub model's parameters.

    KerasHub assigns attributes before the torch module exists, which hides the
    parameters from `parameters()`, DDP and exporters until they are tracked again.
    Variables that wait for their values are tracked when they have them.
    """
    if keras.config.backend() != "torch":
        return
    if all(variable._value is not None for variable in model.variables):
        model._track_variables()

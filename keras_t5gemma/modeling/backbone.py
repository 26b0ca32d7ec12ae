"""The T5Gemma backbone: token ids to hidden states of encoder and decoder."""

import dataclasses
import os
from typing import Any

import keras

from keras_t5gemma import _compat
from keras_t5gemma.checkpoints import catalog, checkpoint, huggingface, presets
from keras_t5gemma.checkpoints.lazy_tensors import parse_dtype, parse_policy
from keras_t5gemma.checkpoints.preset_saving import AtomicSaveToPreset
from keras_t5gemma.config import T5GemmaConfig
from keras_t5gemma.distribution import layouts, mesh
from keras_t5gemma.distribution.prediction import SafeInference
from keras_t5gemma.modeling import bases, weight_loading
from keras_t5gemma.modeling.blockwise_attention import WithAttentionKernel
from keras_t5gemma.modeling.exportable import Exportable
from keras_t5gemma.modeling.in_place import ChangesInPlace
from keras_t5gemma.modeling.layer_iteration import iter_layers, path_of
from keras_t5gemma.modeling.quantized_loading import QUANTIZED
from keras_t5gemma.modeling.towers import Decoder, Encoder
from keras_t5gemma.utils.checks import flag, instance, path
from keras_t5gemma.utils.sizes import parse_shard_size
from keras_t5gemma.utils.types import Tensor


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class Backbone(
    ChangesInPlace,
    WithAttentionKernel,
    SafeInference,
    AtomicSaveToPreset,
    Exportable,
    bases.Backbone,
):
    """T5Gemma encoder-decoder (arXiv 2504.06225), without a task.

    Call it on a dict of int32 arrays `encoder_token_ids`, `encoder_padding_mask`
    `(batch, encoder length)`, `decoder_token_ids` and `decoder_padding_mask` `(batch,
    decoder length)`; sequences are padded on the right with 0. It returns a dict of
    `encoder_sequence_output` `(batch, encoder length, encoder width)` and
    `decoder_sequence_output` `(batch, decoder length, decoder width)` in the compute
    dtype.

    If `decoder` of the config is `None` it is the encoder alone: it takes the two
    encoder arrays and returns `encoder_sequence_output`.

    Args:
        config: a `T5GemmaConfig`, or its dict.
        lineage: dict of what the weights were adapted from, saved with the model;
            `adapt_gemma2` writes it.
        dtype: dtype policy or its name, e.g. `"bfloat16"`; `None` is Keras's global
            policy.
        **kwargs: `name`, `trainable`.

    Raises:
        ValueError: for an inconsistent config, naming the field.

    Examples:
        >>> backbone = keras_t5gemma.Backbone.from_preset("t5gemma_mini")
        >>> ids = np.array([[5, 6, 7]], "int32")
        >>> backbone.encode(ids, ids > 0).shape[:2] == (1, 3)
        True
    """

    def __init__(
        self,
        config: T5GemmaConfig | dict[str, Any],
        lineage: dict[str, Any] | None = None,
        dtype: str | keras.DTypePolicy | None = None,
        **kwargs: Any,
    ):
        if isinstance(config, dict):
            config = T5GemmaConfig.from_dict(config)
        kind = "a T5GemmaConfig, e.g. T5GemmaConfig.pair('s', 's')"
        instance(config, "config", T5GemmaConfig, kind)
        mesh.prepare(config)
        dtype = parse_policy(dtype)
        sides = ("encoder",) if config.decoder is None else ("encoder", "decoder")
        inputs = {
            name: keras.Input((None,), dtype="int32", name=name)
            for side in sides
            for name in (f"{side}_token_ids", f"{side}_padding_mask")
        }
        encoder = Encoder(config, dtype=dtype)
        encoder_output = encoder(
            inputs["encoder_token_ids"], inputs["encoder_padding_mask"]
        )
        outputs = {"encoder_sequence_output": encoder_output}
        decoder: Any = None
        if config.decoder is not None:
            decoder = Decoder(config, dtype=dtype)
            outputs["decoder_sequence_output"] = decoder(
                inputs["decoder_token_ids"],
                inputs["decoder_padding_mask"],
                encoder_output,
                inputs["encoder_padding_mask"],
            )
        if isinstance(dtype, keras.dtype_policies.DTypePolicyMap):
            # Keras 3.15 cannot save a quantized layer that holds the map itself.
            for tower in filter(None, (encoder, decoder)):
                for layer in iter_layers(tower):
                    _compat.set_dtype_policy(layer, dtype[path_of(layer)])
        super().__init__(inputs=inputs, outputs=outputs, dtype=dtype, **kwargs)
        self.config = config
        self.lineage = lineage
        self.encoder = encoder
        self.decoder = decoder
        current = mesh.current()
        if current is not None:  # Raises if the mesh does not fit the model.
            self.get_layout_map(current.device_mesh, current.strategy)
        _compat.track_parameters(self)

    def encode(
        self,
        token_ids: Tensor,
        padding_mask: Tensor,
        training: bool = False,
        causal: bool = False,
    ) -> Tensor:
        """Encode token ids to the states of the last layer.

        Args:
            token_ids: int `(batch, length)`.
            padding_mask: `(batch, length)`, 0 for padding.
            training: turns dropout on.
            causal: attend to earlier tokens only; see `Encoder.call`.

        Returns:
            Encoder output `(batch, length, width)`, in the compute dtype.
        """
        return self.encoder(token_ids, padding_mask, training=training, causal=causal)

    def decode(
        self,
        token_ids: Tensor,
        padding_mask: Tensor = None,
        encoder_output: Tensor = None,
        encoder_padding_mask: Tensor = None,
        cache: dict[str, Any] | None = None,
        index: Tensor = None,
        count: Tensor = None,
        training: bool = False,
        cross_attention: bool = True,
    ) -> Any:
        """Decoder states, of a whole sequence or of the next tokens of a cache.

        Args:
            token_ids: int `(batch, length)`.
            padding_mask: `(batch, length)`; without a cache only.
            encoder_output: from `encode`; without a cache only.
            encoder_padding_mask: the encoder's padding mask; without a cache only.
            cache: from `make_cache`, or from the previous call.
            index: position of the first of `token_ids`, one for all rows or one for
                each; with a cache only.
            count: how many of `token_ids` the cache keeps, the first ones; `None`
                keeps all. With a cache only.
            training: turns dropout on; without a cache only.
            cross_attention: `False` runs the decoder without its cross-attention,
                and needs no encoder output; without a cache only.

        Returns:
            States `(batch, length, width)` without a cache; `(states, cache)`
            with one.

        Raises:
            ValueError: for an encoder alone.
        """
        if self.decoder is None:
            raise ValueError(
                "This Backbone is an encoder alone (`config.decoder` is None): it "
                "can `encode`, but not `decode`."
            )
        if cache is not None:
            return self.decoder.step(token_ids, cache, index, count)
        return self.decoder(
            token_ids,
            padding_mask,
            encoder_output,
            encoder_padding_mask,
            training=training,
            cross_attention=cross_attention,
        )

    def make_cache(
        self,
        encoder_output: Tensor,
        encoder_padding_mask: Tensor,
        length: int,
        rows: int | None = None,
        spare: int = 0,
    ) -> dict[str, Any]:
        """A decoding cache: keys and values of the encoder output, and room for more.

        Args:
            encoder_output: from `encode`, `(batch, encoder length, encoder width)`.
            encoder_padding_mask: `(batch, encoder length)`, 0 for padding.
            length: longest sequence to decode, in tokens.
            rows: a multiple of the batch, for several answers a source; `None` is the
                batch.
            spare: maximum number of tokens that are written and rejected at a time.

        Returns:
            A dict of arrays, the `cache` of `decode`.
        """
        return self.decoder.make_cache(
            encoder_output, encoder_padding_mask, length, rows, spare
        )

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Logits of the vocabulary, soft-capped.

        Args:
            hidden_states: what `decode` returns, `(batch, length, width)`.

        Returns:
            `(batch, length, vocabulary)`, in the compute dtype.
        """
        return self.decoder.logits(hidden_states)

    def next_logits(self, hidden_states: Tensor, capped: bool = True) -> Tensor:
        """Logits of one position, as a step of generation computes them.

        Args:
            hidden_states: states of the position, `(batch, width)`.
            capped: apply the soft cap, which does not change the order.

        Returns:
            `(batch, vocabulary)`.
        """
        return self.decoder.next_logits(hidden_states, capped)

    @property
    def token_embedding(self) -> keras.layers.Layer:
        """The encoder's embedding layer."""
        return self.encoder.token_embedding

    def get_layout_map(
        self, device_mesh: keras.distribution.DeviceMesh, strategy: str = "fsdp"
    ) -> keras.distribution.LayoutMap:
        """Layout map of this model over a mesh, as `distribute` splits it.

        Args:
            device_mesh: a `keras.distribution.DeviceMesh` of axes `"data"`, `"model"`.
            strategy: see `distribute`.

        Returns:
            A `keras.distribution.LayoutMap` of patterns of the variables' paths.

        Raises:
            ValueError: for an unknown strategy or axis, or naming a variable that an
                axis does not divide.
        """
        layout_map = layouts.make_layout_map(
            self.variables, device_mesh, strategy, self.config
        )
        is_split = strategy != "data" and device_mesh.devices.size > 1
        if is_split:
            layouts.check_layouts(self, layout_map)
        return layout_map

    @classmethod
    @weight_loading.normal_tensors()
    def from_preset(
        cls,
        preset: presets.PresetLike,
        load_weights: bool = True,
        encoder_only: bool = False,
        verify_checksums: bool = True,
        allow_non_finite: bool = False,
        **kwargs: Any,
    ) -> "Backbone":
        """Load a preset.

        Args:
            preset: a name of `keras_t5gemma.presets()`, a local folder, or an
                `hf://` or `kaggle://` handle, in the format of this package, of
                KerasHub's T5Gemma, or of transformers.
            load_weights: `False` leaves the weights random; a published name then
                needs no network.
            encoder_only: build the encoder alone and read only its tensors.
            verify_checksums: compare the weights of this package's presets with their
                checksums while they are read.
            allow_non_finite: warn about NaN and infinite weights instead of raising.
            **kwargs: `dtype` (a policy or its name; by default float checkpoints are
                loaded in Keras's global policy; `"int8"` and `"int4"` also quantize),
                `name`, `trainable`; `subfolder`, `revision`, `config`, see
                `presets.take_location`.

        Returns:
            A `Backbone`.

        Raises:
            ValueError: for an unknown preset or keyword, or naming the files that do
                not fit.
            OSError: when a download fails, with instructions.
        """
        flag(load_weights, "load_weights")
        flag(encoder_only, "encoder_only")
        preset = presets.take_location(preset, kwargs)
        checks = verify_checksums, allow_non_finite
        flag(verify_checksums, "verify_checksums")
        flag(allow_non_finite, "allow_non_finite")
        presets.check_keywords(kwargs, ("dtype", "name", "trainable"), cls.__name__)
        mode = None
        if isinstance(kwargs.get("dtype"), str) and kwargs["dtype"] in QUANTIZED:
            mode = kwargs.pop("dtype")
        config = None if load_weights else catalog.published_config(preset)
        if config is None:
            opened = checkpoint.open_checkpoint(preset)
            if opened.is_quantized:
                if kwargs.get("dtype") is None:
                    kwargs["dtype"] = opened.saved_policy()
                return weight_loading.load_quantized(
                    cls, opened, load_weights, encoder_only, *checks, mode, **kwargs
                )
            if load_weights:
                return weight_loading.load_backbone(
                    cls, opened, encoder_only, *checks, mode, **kwargs
                )
            config, kwargs["lineage"] = opened.config, opened.lineage
        if encoder_only:
            config = dataclasses.replace(config, decoder=None)
        backbone = cls(config, **kwargs)
        if mode is not None:
            backbone.quantize(mode)
        return backbone

    def save_weights(
        self,
        filepath: str | os.PathLike[str],
        overwrite: bool = True,
        max_shard_size: float | None = None,
    ) -> None:
        """Save the weights, as `keras.Model.save_weights`.

        On several devices, one weight at a time is gathered from all of them.

        Args:
            filepath: ending in `.weights.h5`, or in `.weights.json` for several files.
            overwrite: replace an existing file without asking.
            max_shard_size: of the largest of several files, in GiB.

        Raises:
            ValueError: for a quantized model with several processes.
        """
        if weight_loading.gather_weights(self, filepath, max_shard_size):
            return
        super().save_weights(filepath, overwrite, max_shard_size)
        weight_loading.record_checksums(self, filepath)

    def save_to_huggingface(
        self,
        folder: str | os.PathLike[str],
        dtype: str | None = None,
        max_shard_size: float | str = 5,
        **kwargs: Any,
    ) -> None:
        """Save a folder that transformers' T5GemmaForConditionalGeneration loads.

        An encoder alone becomes a `T5GemmaEncoderModel`.

        Within the attention window the logits are the same. Beyond it the encoder of
        transformers 5.23 attends to one more token on each side than the official code
        and this package do.

        Args:
            folder: path; an earlier checkpoint in it is replaced, all or nothing.
            dtype: `"float32"`, `"bfloat16"` or `"float16"` to round the weights to;
                `None` keeps the model's.
            max_shard_size: of the largest weight file: a number of GB, or a size with
                a unit, e.g. `"500MB"`.
            **kwargs: of `huggingface.save`, which a task passes.

        Raises:
            ValueError: for a quantized model, or a config that transformers cannot
                express.
        """
        huggingface.save(
            path(folder, "folder"),
            self.config,
            weight_loading.model_tensors(self),
            parse_dtype(self.variable_dtype if dtype is None else dtype),
            max_shard_bytes=parse_shard_size(max_shard_size),
            **kwargs,
        )

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "config": self.config.to_dict(),
            "lineage": self.lineage,
        }

"""Encoder and decoder: token ids to hidden states."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_t5gemma import _compat
from keras_t5gemma.config import FULL, SLIDING, StackConfig, T5GemmaConfig
from keras_t5gemma.distribution import mesh
from keras_t5gemma.modeling import kv_cache
from keras_t5gemma.modeling.blocks import DecoderBlock, EncoderBlock, _Block
from keras_t5gemma.modeling.blockwise_attention import attention_mask
from keras_t5gemma.modeling.dropout import ReplayableSeedGenerator, dropout
from keras_t5gemma.modeling.inference import is_inference
from keras_t5gemma.modeling.layers import RMSNorm, TokenEmbedding, stored_weight
from keras_t5gemma.modeling.masks import Visibility, causal_mask, padding_mask
from keras_t5gemma.modeling.rotary import rotary_angles
from keras_t5gemma.modeling.soft_cap import soft_cap
from keras_t5gemma.utils.types import Tensor


class _Tower(keras.layers.Layer):
    """Embedding, blocks, final norm."""

    def __init__(self, stack: StackConfig, config: T5GemmaConfig, **kwargs: Any):
        super().__init__(autocast=False, **kwargs)
        self.stack = stack
        self.config = config
        # Only a decoder uses the soft cap and the reverse call.
        self.token_embedding = TokenEmbedding(
            config.vocabulary_size,
            stack.hidden_dim,
            embeddings_initializer=keras.initializers.RandomNormal(stddev=0.02),
            logit_soft_cap=config.final_soft_cap,
            name="token_embedding",
            dtype=self.dtype_policy,
        )
        # Whether blocks keep only their input for the backward pass.
        self.rematerialize = False
        # See `WithAttentionKernel`.
        self.attention_kernel = "auto"
        if config.dropout:
            self.seed_generator = keras.random.SeedGenerator(name="dropout_seed")
        self.final_norm = RMSNorm(
            stack.rms_norm_epsilon, name="final_norm", dtype=self.dtype_policy
        )
        self.blocks = [self._block(i) for i in range(stack.num_layers)]

    def build(self, *_):
        shape = (None, None, self.stack.hidden_dim)
        self.token_embedding.build()
        for block in self.blocks:
            block.build(shape)
        self.final_norm.build(shape)

    def _seeds(self, training):
        if not training or not self.config.dropout:
            return None
        return ReplayableSeedGenerator(self.seed_generator.next())

    def _run(
        self, block: _Block, inputs: tuple, training: bool | None, **kwargs: Any
    ) -> Tensor:
        """States of `block(*inputs)`, rematerialized if asked for.

        Tensors that need a gradient must be in `inputs`: `keras.remat` treats
        others as constants.
        """
        seeds = self._seeds(training)

        def run(*inputs):
            result = block(*inputs, seeds=seeds and seeds.replay(), **kwargs)
            return result[0] if isinstance(result, tuple) else result

        run = keras.remat(run) if training and self.rematerialize else run
        return run(*inputs)

    def _embed(self, token_ids, training):
        x = mesh.look_up(self.token_embedding, token_ids)  # B T D
        # Gemma rounds the factor to the compute dtype before it multiplies.
        x = x * ops.cast(self.stack.hidden_dim**0.5, x.dtype)
        return dropout(x, self.config.dropout, self._seeds(training))

    def _mask(self, queries, keys, causal, window=None):
        """See `attention_mask`."""
        visibility = Visibility(queries, keys, causal, window)
        return attention_mask(visibility, self.attention_kernel)

    def _self_masks(self, padding, causal):
        """The mask of each kind of layer."""
        windows = {FULL: None, SLIDING: self.stack.sliding_window}
        kinds = sorted(set(self.stack.layer_types))
        return {k: self._mask(padding, padding, causal, windows[k]) for k in kinds}

    def _angles(self, positions):
        return rotary_angles(positions, self.stack.head_dim, self.stack.rope_base)


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class Encoder(_Tower):
    """Bidirectional Gemma 2 encoder.

    Args:
        config: the pair's `T5GemmaConfig`.
    """

    def __init__(self, config: T5GemmaConfig, name: str = "encoder", **kwargs: Any):
        super().__init__(config.encoder, config, name=name, **kwargs)

    def _block(self, i):
        return EncoderBlock(
            self.stack,
            dropout=self.config.dropout,
            name=f"block_{i}",
            dtype=self.dtype_policy,
        )

    def call(
        self,
        token_ids: Tensor,
        padding: Tensor,
        training: bool | None = None,
        layers: Sequence[int] | None = None,
        causal: bool = False,
    ) -> Any:
        """Hidden states of token ids.

        Texts packed into one row do not attend to each other when `padding` holds
        segment ids. Positions need not restart with each text: rotary embedding
        depends on distances alone.

        Args:
            token_ids: int `(B, T)`.
            padding: int `(B, T)`, 0 for padding, 1 for a token; or segment ids, k
                for a token of the k-th text of the row.
            training: turns dropout on.
            layers: numbers of blocks after which states are wanted, 0 for the
                embeddings; no more blocks run than needed. `None` wants the states
                after all blocks and the final norm.
            causal: attend to earlier tokens only, like the decoder-only model that
                an adapted encoder comes from.

        Returns:
            `(B, T, D)`; with `layers` a list of them, without the final norm.
        """
        positions = ops.arange(ops.shape(token_ids)[1])
        angles = self._angles(positions)
        masks = self._self_masks(padding, causal)
        x = self._embed(token_ids, training)
        numbers = (len(self.blocks),) if layers is None else layers
        found = self._states(x, masks, angles, numbers, training)
        if layers is not None:
            return [found[number] for number in layers]
        return self.normalize(found[len(self.blocks)], training)

    def _states(self, x, masks, angles, numbers, training):
        """`{number: states}` after blocks, 0 for `x`; see `call`."""
        if not training and keras.config.backend() == "torch":
            from keras_t5gemma.modeling import torch_encoder

            # Dynamo cannot trace `is_inference`.
            is_fast = not _compat.torch_is_tracing() and is_inference()
            if is_fast and torch_encoder.is_supported(self, x, masks):
                return torch_encoder.run(self, x, masks, angles, numbers)
        found = {0: x}
        blocks = list(zip(self.blocks, self.stack.layer_types, strict=True))
        for i, (block, kind) in enumerate(blocks[: max(numbers, default=0)]):
            x = self._run(
                block, (x,), training, attention_mask=masks[kind], angles=angles
            )
            if i + 1 in numbers:
                found[i + 1] = x
        return found

    def normalize(self, states: Tensor, training: bool | None = None) -> Tensor:
        """Final norm of states `(B, T, D)`, with the dropout of the output."""
        states = self.final_norm(states)
        return dropout(states, self.config.dropout, self._seeds(training))


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class Decoder(_Tower):
    """Causal Gemma 2 decoder with cross-attention to the encoder output.

    Args:
        config: the pair's `T5GemmaConfig`.
    """

    def __init__(self, config: T5GemmaConfig, name: str = "decoder", **kwargs: Any):
        assert config.decoder is not None
        super().__init__(config.decoder, config, name=name, **kwargs)

    def _block(self, i):
        return DecoderBlock(
            self.stack,
            self.config.encoder.hidden_dim,
            dropout=self.config.dropout,
            name=f"block_{i}",
            dtype=self.dtype_policy,
        )

    def call(
        self,
        token_ids: Tensor,
        padding: Tensor,
        encoder_output: Tensor = None,
        encoder_padding: Tensor = None,
        training: bool | None = None,
        cross_attention: bool = True,
    ) -> Tensor:
        """Decode a whole sequence at once, as in training.

        Args:
            token_ids: int `(B, T)`.
            padding: int `(B, T)`, 0 for padding, 1 for a token; or segment ids, k
                for a token of the k-th text of the row, which attends to segment k
                of the encoder output; see `Encoder.call`.
            encoder_output: `(B, S, D of the encoder)`.
            encoder_padding: `(B, S)`, the encoder's `padding`.
            training: turns dropout on.
            cross_attention: `False` leaves the cross-attention sub-layers out, and
                needs no encoder output: the decoder-only model that an adapted
                decoder comes from.

        Returns:
            `(B, T, D)`, after the final norm.
        """
        positions = ops.arange(ops.shape(token_ids)[1])
        masks = self._self_masks(padding, causal=True)
        angles = self._angles(positions)
        cross_inputs: tuple[Tensor, ...] = ()
        cross_mask = None
        if cross_attention:
            cross_inputs = (encoder_output,)
            cross_mask = self._mask(padding, encoder_padding, causal=False)
        x = self._embed(token_ids, training)
        for block, kind in zip(self.blocks, self.stack.layer_types, strict=True):
            x = self._run(
                block,
                (x, *cross_inputs),
                training,
                attention_mask=masks[kind],
                cross_mask=cross_mask,
                angles=angles,
                cross_attention=cross_attention,
            )
        return dropout(self.final_norm(x), self.config.dropout, self._seeds(training))

    def make_cache(
        self,
        encoder_output: Tensor,
        encoder_padding: Tensor,
        length: int,
        rows: int | None = None,
        spare: int = 0,
        cross: tuple | None = None,
    ) -> dict[str, Any]:
        """Decoding cache, see `kv_cache`: cross-attention filled, the rest zeros.

        Args:
            encoder_output: `(B, S, D of the encoder)`.
            encoder_padding: `(B, S)`.
            length: longest sequence to decode, in tokens.
            rows: a multiple of B, for several answers a source; `None` is B.
            spare: see `make_self_cache`.
            cross: keys and values of the encoder output of every layer, if known.
        """
        rows = ops.shape(encoder_output)[0] if rows is None else rows
        if cross is None:
            cross = tuple(
                block.cross_attention.project_keys_values(encoder_output)
                for block in self.blocks
            )
        return {
            "self": kv_cache.make_self_cache(
                self.stack, rows, length, self.compute_dtype, spare
            ),
            "cross": cross,
            "cross_mask": ops.cast(encoder_padding, "bool"),
        }

    def step(
        self,
        token_ids: Tensor,
        cache: dict[str, Any],
        index: Tensor,
        count: Tensor = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Decode the next tokens after those in the cache.

        Args:
            token_ids: int `(B, T)`, the tokens at positions
                `index ... index + T - 1`.
            cache: from `make_cache`, or from the previous step.
            index: scalar int; or `(B,)`, one of each row, for a cache with T - 1 spare
                slots.
            count: how many of the T tokens the cache keeps, the first ones; `None`
                keeps all.

        Returns:
            `(hidden states (B, T, D), cache)`.
        """
        length = token_ids.shape[1]
        index = ops.convert_to_tensor(index, "int32")
        positions = index[..., None] + ops.arange(length)  # T, or B T
        angles = self._angles(positions)
        cross_mask = padding_mask(cache["cross_mask"])
        masks = {}
        for (key, _), kind in zip(cache["self"], self.stack.layer_types, strict=True):
            if kind not in masks:
                keys = kv_cache.key_positions(index, length, key.shape[2])
                window = self.stack.sliding_window if kind == SLIDING else None
                mask = causal_mask(positions, keys, window)
                masks[kind] = mask if len(mask.shape) == 3 else mask[None]  # B T S
        x = self._embed(token_ids, False)
        updated = []
        for i, kind in enumerate(self.stack.layer_types):
            x, layer_cache = self.blocks[i](
                x,
                attention_mask=masks[kind],
                cross_mask=cross_mask,
                angles=angles,
                cache=cache["self"][i],
                cross_cache=cache["cross"][i],
                index=index,
                count=count,
            )
            updated.append(layer_cache)
        return self.final_norm(x), {**cache, "self": tuple(updated)}

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Soft-capped vocabulary logits `(B, T, V)` of hidden states."""
        return self.token_embedding(hidden_states, reverse=True)

    def logit_table(self) -> Tensor:
        """Output embedding `(V, D)` of the logits, in the compute dtype.

        `None` for int4, which Keras stores packed.
        """
        layer = self.token_embedding
        if layer.quantization_mode == "int8":
            table = stored_weight(layer, "embeddings")
            scale = ops.cast(layer.embeddings_scale, self.compute_dtype)
            return ops.cast(table, self.compute_dtype) / scale[:, None]
        if layer.quantization_mode:
            return None
        return ops.cast(layer.embeddings, self.compute_dtype)

    def next_logits(self, hidden_states: Tensor, capped: bool = True) -> Tensor:
        """Logits `(B, V)` of the states `(B, D)` of one position, for generation.

        Computed as table times states: with few rows this reads the table once, at
        nearly memory bandwidth. The soft cap does not change which logit is the
        largest; `capped=False` leaves it out.
        """
        table = self.token_embedding
        cap = self.config.final_soft_cap if capped else None
        by_parts = keras.config.backend() != "torch" and not table.lora_enabled
        # Chunks of a table that a mesh splits would each lie on one device.
        by_parts = by_parts and mesh.shards_of_rows(self.config.vocabulary_size) == 1
        if table.quantization_mode == "int8" and by_parts:
            return soft_cap(table.int8_logits(hidden_states), cap)
        if table.quantization_mode or table.lora_enabled:
            return self.logits(hidden_states[:, None])[:, 0]
        size, width = self.config.vocabulary_size, self.stack.hidden_dim
        chunks = 4 if size % 4 == 0 else 1
        weights = ops.cast(table.embeddings, self.compute_dtype)
        weights = ops.reshape(weights, (chunks, size // chunks, width))
        out = ops.matmul(weights, ops.transpose(hidden_states))  # chunks V/chunks B
        logits = ops.transpose(ops.reshape(out, (size, -1)))
        return soft_cap(logits, cap)

"""The two towers: token ids to hidden states."""

import keras
from keras import ops

from keras_t5gemma.distribution import mesh
from keras_t5gemma.modeling import kv_cache
from keras_t5gemma.modeling.blocks import DecoderBlock, EncoderBlock
from keras_t5gemma.modeling.dropout import ReplayableSeedGenerator, dropout
from keras_t5gemma.modeling.layers import RMSNorm, TokenEmbedding, soft_cap
from keras_t5gemma.modeling.masks import (
    causal_mask,
    padding_mask,
    segment_mask,
    two_sided_mask,
)
from keras_t5gemma.modeling.rotary import rotary_angles


class _Tower(keras.layers.Layer):
    def __init__(self, stack, config, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.stack = stack
        self.config = config
        # The soft cap and the reverse call serve the decoder; an encoder's
        # table is the same layer, never called in reverse.
        self.token_embedding = TokenEmbedding(
            config.vocabulary_size,
            stack.hidden_dim,
            embeddings_initializer=keras.initializers.RandomNormal(stddev=0.02),
            logit_soft_cap=config.final_soft_cap,
            name="token_embedding",
            dtype=self.dtype_policy,
        )
        # Blocks keep only their input for the backward pass.
        self.rematerialize = False
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

    def _run(self, block, inputs, training, **kwargs):
        """States of `block(*inputs)`; what is differentiated must be in `inputs`."""
        seeds = self._seeds(training)

        def run(*inputs):
            result = block(*inputs, seeds=seeds and seeds.again(), **kwargs)
            return result[0] if isinstance(result, tuple) else result

        run = keras.remat(run) if training and self.rematerialize else run
        return run(*inputs)

    def _embed(self, token_ids, training):
        x = mesh.look_up(self.token_embedding, token_ids)  # B T D
        # Gemma rounds the factor to the compute dtype before it multiplies.
        x = x * ops.cast(self.stack.hidden_dim**0.5, x.dtype)
        return dropout(x, self.config.dropout, self._seeds(training))

    def _angles(self, positions):
        return rotary_angles(positions, self.stack.head_dim, self.stack.rope_base)


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class Encoder(_Tower):
    """Reads: bidirectional Gemma 2.

    Args:
        config: the pair's `T5GemmaConfig`.
    """

    def __init__(self, config, name="encoder", **kwargs):
        super().__init__(config.encoder, config, name=name, **kwargs)

    def _block(self, i):
        return EncoderBlock(
            self.stack,
            dropout=self.config.dropout,
            name=f"block_{i}",
            dtype=self.dtype_policy,
        )

    def call(self, token_ids, padding, training=None, layer=None):
        """Encode.

        Several texts in a row do not see each other when `padding` numbers them.
        They need no positions of their own: rotary embedding tells distances only.

        Args:
            token_ids: int `(B, T)`.
            padding: `(B, T)`, 0 for padding, 1 for a token; or k for a token of the
                row's k-th text.
            training: turns dropout on.
            layer: how many blocks to go through, without the final norm; `None` is
                all of them, with it.

        Returns:
            `(B, T, D)`.
        """
        positions = ops.arange(ops.shape(token_ids)[1])
        angles = self._angles(positions)
        everything = segment_mask(padding, padding)  # B T T
        near = two_sided_mask(positions, self.stack.sliding_window)
        masks = {
            "full_attention": everything,
            "sliding_attention": ops.logical_and(everything, near),
        }
        x = self._embed(token_ids, training)
        blocks = zip(self.blocks, self.stack.layer_types, strict=True)
        for block, kind in list(blocks)[:layer]:
            x = self._run(
                block, (x,), training, attention_mask=masks[kind], angles=angles
            )
        if layer is not None:
            return x
        return dropout(self.final_norm(x), self.config.dropout, self._seeds(training))


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class Decoder(_Tower):
    """Writes: causal Gemma 2 with cross-attention to the encoder output.

    Args:
        config: the pair's `T5GemmaConfig`.
    """

    def __init__(self, config, name="decoder", **kwargs):
        super().__init__(config.decoder, config, name=name, **kwargs)

    def _block(self, i):
        return DecoderBlock(
            self.stack,
            self.config.encoder.hidden_dim,
            dropout=self.config.dropout,
            name=f"block_{i}",
            dtype=self.dtype_policy,
        )

    def _masks(self, query_positions, key_positions, keep=None):
        masks = {
            "full_attention": causal_mask(query_positions, key_positions),
            "sliding_attention": causal_mask(
                query_positions, key_positions, self.stack.sliding_window
            ),
        }  # T S
        if keep is None:
            return {kind: mask[None] for kind, mask in masks.items()}
        return {kind: ops.logical_and(keep, mask) for kind, mask in masks.items()}

    def call(self, token_ids, padding, memory, memory_padding, training=None):
        """Decode a whole sequence at once, as in training.

        Args:
            token_ids: int `(B, T)`.
            padding: `(B, T)`, 0 for padding, 1 for a token; or k for a token of the
                row's k-th text, which sees the k-th of `memory`; see `Encoder.call`.
            memory: encoder output `(B, S, D of the encoder)`.
            memory_padding: `(B, S)`, the encoder's `padding`.
            training: turns dropout on.

        Returns:
            `(B, T, D)`, after the final norm.
        """
        positions = ops.arange(ops.shape(token_ids)[1])
        masks = self._masks(positions, positions, segment_mask(padding, padding))
        angles = self._angles(positions)
        cross_mask = segment_mask(padding, memory_padding)  # B T S
        x = self._embed(token_ids, training)
        for block, kind in zip(self.blocks, self.stack.layer_types, strict=True):
            x = self._run(
                block,
                (x, memory),
                training,
                attention_mask=masks[kind],
                cross_mask=cross_mask,
                angles=angles,
            )
        return dropout(self.final_norm(x), self.config.dropout, self._seeds(training))

    def make_cache(self, memory, memory_padding, length, rows=None):
        """The cache of `kv_cache`, cross-attention filled, the rest zeros.

        Args:
            memory: encoder output `(B, S, D of the encoder)`.
            memory_padding: `(B, S)`.
            length: the longest sequence that will be decoded.
            rows: a multiple of B, for several answers a source; `None` is B.
        """
        rows = ops.shape(memory)[0] if rows is None else rows
        return {
            "self": kv_cache.make_self_cache(
                self.stack, rows, length, self.compute_dtype
            ),
            "cross": tuple(
                block.cross_attention.project_memory(memory) for block in self.blocks
            ),
            "cross_mask": ops.cast(memory_padding, "bool"),
        }

    def step(self, token_ids, cache, index, count=None):
        """Decode a few more tokens after those in the cache.

        Args:
            token_ids: int `(B, T)`, the tokens at positions
                `index ... index + T - 1`.
            cache: of `make_cache`, or of the step before.
            index: scalar int.
            count: how many of the T go into the cache, the first ones; `None` is all.

        Returns:
            `(hidden states (B, T, D), cache)`.
        """
        length = token_ids.shape[1]
        positions = index + ops.arange(length)
        angles = self._angles(positions)
        cross_mask = padding_mask(cache["cross_mask"])
        masks = {}
        for (key, _), kind in zip(cache["self"], self.stack.layer_types, strict=True):
            if kind not in masks:
                keys = kv_cache.key_positions(index, length, key.shape[2])
                masks[kind] = self._masks(positions, keys)[kind]
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

    def logits(self, hidden_states):
        """Soft-capped vocabulary logits `(B, T, V)` of hidden states."""
        return self.token_embedding(hidden_states, reverse=True)

    def logit_table(self):
        """The table `(V, D)` that logits are products with, in the compute dtype.

        `None` for int4, whose format is Keras's own affair.
        """
        layer = self.token_embedding
        if layer.quantization_mode == "int8":
            scale = ops.cast(layer.embeddings_scale, self.compute_dtype)
            return ops.cast(layer._embeddings, self.compute_dtype) / scale[:, None]
        if layer.quantization_mode:
            return None
        return ops.cast(layer.embeddings, self.compute_dtype)

    def next_logits(self, hidden_states, capped=True):
        """Logits `(B, V)` of one position's states `(B, D)`, for generation.

        The table times the states, not the other way round: with few rows that reads
        the table once at nearly the speed of the memory. The soft cap does not change
        which logit is the largest; `capped=False` leaves it out.
        """
        table = self.token_embedding
        cap = self.config.final_soft_cap if capped else None
        by_parts = keras.config.backend() != "torch" and not table.lora_enabled
        # Parts of a table that a mesh splits would each lie on one of its devices.
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

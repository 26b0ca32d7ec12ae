"""Adaptation identities: an adapted checkpoint against the Gemma 2 it came from.

The encoder with a causal mask gives its source's hidden states, the decoder without
its cross-attention its source's logits, and copied cross-attention equals the
self-attention of its layer.
"""

import dataclasses
import gc
import math
from pathlib import Path
from typing import Any

import numpy as np
from keras import ops

from keras_t5gemma.checkpoints import checkpoint, integrity, weight_maps
from keras_t5gemma.checkpoints.lazy_tensors import CastTensor, FirstRows
from keras_t5gemma.conversion.gemma2_reader import Gemma2, live_layers
from keras_t5gemma.environment import require_keras_hub
from keras_t5gemma.modeling import weight_loading
from keras_t5gemma.modeling.backbone import Backbone
from keras_t5gemma.utils.types import Tensor

_VOCABULARY = 1024  # Rows of the embedding tables that the identities are checked on.


def check_identities(
    folder: str | Path,
    sources: dict[str, Gemma2],
    max_bytes: int,
    tolerance: float = 1e-4,
) -> list[str]:
    """Check the adaptation identities on the files of an adapted checkpoint.

    The sources run in KerasHub's GemmaBackbone. All layers take part when the blocks
    of a tower fit in `max_bytes`, otherwise two of them; of the vocabulary the first
    1,024 tokens.

    Args:
        folder: path of the adapted preset.
        sources: `{"encoder": Gemma2, "decoder": Gemma2}`.
        max_bytes: bytes that the float32 blocks of a tower may take.
        tolerance: largest difference, relative to the largest value.

    Returns:
        Lines of text, one for each identity.

    Raises:
        ValueError: when an identity does not hold.
    """
    opened = checkpoint.open_checkpoint(folder)
    report = []
    if (opened.lineage or {}).get("cross_attention") == "copy":
        report.append(_check_copies(folder, opened))
    rng = np.random.default_rng(0)
    for side, source in sources.items():
        stack, layers = source.stack, _sample(source.stack, max_bytes)
        size = min(source.vocabulary_size, _VOCABULARY)
        # Shorter than the window, so that the sampled layers may be of one kind.
        ids = rng.integers(0, size, (2, min(12, stack.sliding_window)), dtype="int32")
        expected = _source_output(opened, side, source, layers, ids)
        gc.collect()  # Keras models are reference cycles; keep one in memory.
        if expected is None:
            report.append(
                f"{side}: not compared, KerasHub's Gemma does not have its query scale"
            )
            continue
        adapted = _adapted_output(opened, side, layers, ids)
        gc.collect()
        output = "hidden states" if side == "encoder" else "logits"
        scale = max(1.0, float(np.abs(expected).max()))
        difference = float(np.abs(adapted - expected).max()) / scale
        if not difference <= tolerance:
            raise ValueError(
                f"The adapted model is wrong: its {side}'s {output} differ from "
                f"{source.name}'s by {difference:.1e}, more than {tolerance:.0e}."
            )
        report.append(
            f"{side}: {output} equal {source.name}'s within {difference:.1e}, on "
            f"{len(layers)} of {stack.num_layers} layers"
        )
    return report


def _check_copies(folder, opened):
    checksums = integrity.read_checksums(Path(folder)).tensors
    for i in range(opened.config.decoder.num_layers):
        for name in ("query", "key", "value", "output"):
            block = f"decoder/block_{i}"
            cross, self_ = (
                checksums[f"{block}/{kind}_attention/{name}/kernel"]
                for kind in ("cross", "self")
            )
            if cross != self_:
                raise ValueError(
                    f"The adapted model is wrong: {block}'s cross-attention {name} "
                    "is not a copy of its self-attention's."
                )
    return f"cross-attention: a copy of self-attention in all {i + 1} layers"


def _sample(stack, max_bytes):
    """Layers to check: all if their float32 values fit, else a local and a global."""
    if 4 * stack.count_params() <= max_bytes or stack.num_layers <= 2:
        return list(range(stack.num_layers))
    first = stack.num_layers // 4 * 2  # Even, in the middle.
    return [first, first + 1]


def _slice_stack(stack, layers):
    types = tuple(stack.layer_types[i] for i in layers)
    return dataclasses.replace(stack, num_layers=len(layers), layer_types=types)


def _slice_tensors(tensors, layers, prefix=""):
    """Tensors of some layers, renumbered from 0, with the first embedding rows."""
    result = {}
    for path, tensor in tensors.items():
        if not path.startswith(prefix):
            continue
        name = path.removeprefix(prefix)
        head, _, leaf = name.partition("/")
        if head.startswith("block_"):
            i = int(head.removeprefix("block_"))
            if i not in layers:
                continue
            name = f"block_{layers.index(i)}/{leaf}"
        elif head == "token_embedding":
            tensor = FirstRows(tensor, _VOCABULARY)
        result[prefix + name] = tensor
    return result


def _adapted_output(opened, side, layers, token_ids):
    """Hidden states or logits of the adapted model, built with some layers only."""
    config, tensors = opened.config, opened.tensors()
    changes = {"vocabulary_size": min(config.vocabulary_size, _VOCABULARY)}
    taken = {"encoder": layers if side == "encoder" else [0]}
    if side == "decoder":
        taken["decoder"] = layers
    sliced = {}
    for tower in ("encoder", "decoder"):
        stack = None
        if tower in taken:
            stack = _slice_stack(getattr(config, tower), taken[tower])
            sliced |= _slice_tensors(tensors, taken[tower], f"{tower}/")
        changes[tower] = stack
    model = weight_loading.fill(
        Backbone, dataclasses.replace(config, **changes), sliced, dtype="float32"
    )
    if side == "encoder":
        return ops.convert_to_numpy(causal_encoder_states(model, token_ids))
    return ops.convert_to_numpy(decoder_logits_without_cross(model, token_ids))


def _source_output(opened, side, source, layers, token_ids):
    """The same of the source, in KerasHub's model; `None` if that cannot express it."""
    dtype = opened.tensors()["encoder/final_norm/scale"].dtype
    reference = _reference(source, layers, dtype)
    if reference is None:
        return None
    ones = np.ones_like(token_ids)
    output = reference({"token_ids": token_ids, "padding_mask": ones})
    if side == "decoder":
        output = reference.token_embedding(output, reverse=True)
    return ops.convert_to_numpy(output)


def _reference(source, layers, dtype):
    """KerasHub's GemmaBackbone with some layers of a source, rounded to `dtype`."""
    stack = source.stack
    scales = {
        True: stack.head_dim**-0.5,
        False: (stack.hidden_dim // stack.num_query_heads) ** -0.5,
    }
    by_head = [k for k, v in scales.items() if math.isclose(v, stack.query_scale)]
    if not by_head:
        return None
    keras_hub = require_keras_hub("The check of an adaptation")
    backbone = keras_hub.models.GemmaBackbone(
        vocabulary_size=min(source.vocabulary_size, _VOCABULARY),
        num_layers=len(layers),
        num_query_heads=stack.num_query_heads,
        num_key_value_heads=stack.num_key_value_heads,
        hidden_dim=stack.hidden_dim,
        intermediate_dim=2 * stack.intermediate_dim,
        head_dim=stack.head_dim,
        layer_norm_epsilon=stack.rms_norm_epsilon,
        query_head_dim_normalize=by_head[0],
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        final_logit_soft_cap=source.final_soft_cap,
        attention_logit_soft_cap=stack.attention_soft_cap,
        dtype="float32",
    )
    layers_by_name = live_layers(backbone)
    tensors = _slice_tensors(source.tensors, layers)
    rows = weight_maps.expand(weight_maps.GEMMA2_KERAS_HUB, len(layers))
    for path, (name, transform) in rows.items():
        array = CastTensor(tensors[path], dtype).read().astype("float32")
        value = transform.to_file(array, stack.head_dim)
        layers_by_name[name].weights[0].assign(value)
    return backbone


def causal_encoder_states(backbone: Backbone, token_ids: Any) -> Tensor:
    """Hidden states `(B, T, D)` of the encoder run as a decoder-only model.

    Args:
        backbone: a `Backbone`.
        token_ids: int `(B, T)`.
    """
    return backbone.encode(token_ids, np.ones_like(token_ids), causal=True)


def decoder_logits_without_cross(backbone: Backbone, token_ids: Any) -> Tensor:
    """Soft-capped logits `(B, T, V)` of the decoder without its cross-attention.

    Args:
        backbone: a `Backbone`.
        token_ids: int `(B, T)`.
    """
    mask = np.ones_like(token_ids)
    return backbone.logits(backbone.decode(token_ids, mask, cross_attention=False))

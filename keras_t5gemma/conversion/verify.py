"""Proof that a checkpoint is what it should be: against another, or its sources."""

import dataclasses
import gc
import hashlib
import math
import os
from pathlib import Path

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_t5gemma.checkpoints import checkpoint, keras_format, weight_maps
from keras_t5gemma.checkpoints.lazy_tensors import CastTensor, FirstRows, to_bytes
from keras_t5gemma.conversion.gemma2 import live_layers
from keras_t5gemma.modeling import weight_loading
from keras_t5gemma.modeling.backbone import Backbone
from keras_t5gemma.modeling.masks import causal_mask

_CHUNK = 4_000_000  # Elements of a tensor that are compared at a time.
_VOCABULARY = 1024  # Rows of the embedding tables that the identities are tried on.


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Args:
        configs: lines on fields that differ; empty when none does.
        only_a: paths of variables that only the first has.
        only_b: likewise.
        tensors: `{path: max|a - b|}`, NaN where shapes differ or a value is not
            finite on one side only.
        logits: max|a - b| of the logits, or `None` when they were not computed.
        note: why not; `""` when they were.
    """

    configs: list
    only_a: list
    only_b: list
    tensors: dict
    logits: float | None
    note: str

    def within(self, tolerance):
        """Whether nothing differs by more than `tolerance`."""
        differences = [*self.tensors.values()]
        differences += [] if self.logits is None else [self.logits]
        same = not (self.configs or self.only_a or self.only_b)
        return same and all(d <= tolerance for d in differences)


def compare(a, b, seed=0):
    """Two checkpoints of any supported formats, tensor by tensor and by logits.

    Args:
        a: name, folder or handle; see `presets.resolve`.
        b: likewise.
        seed: of the random inputs that the logits are computed on, in float32.

    Raises:
        ValueError: for what is no T5Gemma checkpoint.
    """
    opened = [checkpoint.open_checkpoint(x) for x in (a, b)]
    configs = _config_differences(*(c.config.to_dict() for c in opened))
    tensors = [c.tensors() for c in opened]
    differences = {
        path: max_difference(tensor, tensors[1][path])
        for path, tensor in tensors[0].items()
        if path in tensors[1]
    }
    logits, note = None, ""
    needed = 4.5 * opened[0].config.count_params()  # float32, and what comes with it.
    if configs:
        note = "the configurations differ"
    elif needed > _free_memory():
        note = f"a float32 model needs {needed / 1e9:.1f} GB of free memory"
    else:
        logits = float(np.abs(np.subtract(*(_logits(c, seed) for c in opened))).max())
    return Comparison(
        configs,
        sorted(set(tensors[0]) - set(tensors[1])),
        sorted(set(tensors[1]) - set(tensors[0])),
        differences,
        logits,
        note,
    )


def _config_differences(a, b, prefix=""):
    lines = []
    for name in a:
        if isinstance(a[name], dict) and isinstance(b[name], dict):
            lines += _config_differences(a[name], b[name], f"{prefix}{name}.")
        elif a[name] != b[name]:
            lines.append(f"{prefix}{name}: {a[name]} and {b[name]}")
    return lines


def max_difference(a, b):
    """max|a - b| of two unread tensors; NaN when they cannot be compared."""
    if tuple(a.shape) != tuple(b.shape):
        return math.nan
    x, y = (np.ascontiguousarray(t.read()).reshape(-1) for t in (a, b))
    largest = 0.0
    for start in range(0, x.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        p, q = x[part].astype("float32"), y[part].astype("float32")
        different = p != q  # Equal infinities are equal.
        if different.any():
            delta = float(np.abs(p[different] - q[different]).max())
            largest = delta if math.isnan(delta) else max(largest, delta)
    return largest


def _logits(opened, seed):
    model = weight_loading.load_backbone(Backbone, opened, dtype="float32")
    rng = np.random.default_rng(seed)
    size = opened.config.vocabulary_size
    x = {}
    for side in ("encoder", "decoder") if model.decoder else ("encoder",):
        ids = rng.integers(4, size, (2, 12), dtype="int32")
        x[f"{side}_token_ids"] = ids
        x[f"{side}_padding_mask"] = np.ones_like(ids)
    out = model(x)
    if model.decoder is None:
        return ops.convert_to_numpy(out["encoder_sequence_output"])
    return ops.convert_to_numpy(model.logits(out["decoder_sequence_output"]))


def _free_memory():
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_checksums(folder):
    """Read every tensor of a preset of ours and compare its noted sha256.

    Returns:
        The number of tensors, 0 when the folder has no checksums.

    Raises:
        ValueError: for a folder that holds no checkpoint, or naming the tensors that
            have changed.
    """
    opened = checkpoint.open_checkpoint(folder)
    noted = keras_format.read_checksums(Path(folder))
    if noted is None:
        return 0
    tensors = opened.tensors()
    changed = sorted(set(noted) ^ set(tensors))
    changed += [
        path
        for path, tensor in tensors.items()
        if path in noted
        and hashlib.sha256(to_bytes(tensor.read())).hexdigest() != noted[path]
    ]
    if changed:
        raise ValueError(
            f"{folder} is damaged: these tensors are not what was written: {changed}."
        )
    return len(tensors)


def check_identities(folder, sources, room, tolerance=1e-4):
    """The adaptation identities, on the files of an adapted checkpoint.

    The encoder with a causal mask gives its source's hidden states; the decoder with
    its cross-attention silenced gives its source's logits; copied cross-attention is
    the self-attention of its layer. The sources run in KerasHub's GemmaBackbone. All
    layers take part when the blocks of a tower fit in `room`, otherwise two, and the
    first 1,024 rows of the vocabulary.

    Args:
        folder: path of the adapted preset.
        sources: `{"encoder": Gemma2, "decoder": Gemma2}`.
        room: bytes that the float32 blocks of a tower may take.
        tolerance: largest difference, relative to the largest value.

    Returns:
        Lines that say what was found.

    Raises:
        ValueError: when an identity does not hold.
    """
    opened = checkpoint.open_checkpoint(folder)
    report = []
    if opened.lineage["cross_attention"] == "copy":
        report.append(_check_copies(folder, opened))
    rng = np.random.default_rng(0)
    for side, source in sources.items():
        stack, layers = source.stack, _sample(source.stack, room)
        size = min(source.vocabulary_size, _VOCABULARY)
        # Within the window, which the sampled layers need not alternate.
        ids = rng.integers(0, size, (2, min(12, stack.sliding_window)), dtype="int32")
        theirs = _source_output(opened, side, source, layers, ids)
        gc.collect()  # Keras models are cycles; hold one at a time.
        if theirs is None:
            report.append(
                f"{side}: not compared, its query scale is not one KerasHub has"
            )
            continue
        ours = _adapted_output(opened, side, layers, ids)
        gc.collect()
        what = "hidden states" if side == "encoder" else "logits"
        scale = max(1.0, float(np.abs(theirs).max()))
        difference = float(np.abs(ours - theirs).max()) / scale
        if not difference <= tolerance:
            raise ValueError(
                f"The adapted model is wrong: its {side}'s {what} differ from "
                f"{source.name}'s by {difference:.1e}, more than {tolerance:.0e}."
            )
        report.append(
            f"{side}: {what} equal {source.name}'s within {difference:.1e}, on "
            f"{len(layers)} of {stack.num_layers} layers"
        )
    return report


def _check_copies(folder, opened):
    noted = keras_format.read_checksums(Path(folder))
    for i in range(opened.config.decoder.num_layers):
        for name in ("query", "key", "value", "output"):
            block = f"decoder/block_{i}"
            cross, self_ = (
                noted[f"{block}/{kind}_attention/{name}/kernel"]
                for kind in ("cross", "self")
            )
            if cross != self_:
                raise ValueError(
                    f"The adapted model is wrong: {block}'s cross-attention {name} "
                    "is not a copy of its self-attention's."
                )
    return f"cross-attention: a copy of self-attention in all {i + 1} layers"


def _sample(stack, room):
    """Layers to try: all when their float32 values fit, else a local and a global."""
    if 4 * stack.count_params() <= room or stack.num_layers <= 2:
        return list(range(stack.num_layers))
    first = stack.num_layers // 4 * 2  # Even, in the middle.
    return [first, first + 1]


def _slice_stack(stack, layers):
    types = tuple(stack.layer_types[i] for i in layers)
    return dataclasses.replace(stack, num_layers=len(layers), layer_types=types)


def _slice_tensors(tensors, layers, prefix=""):
    """The tensors of a few layers, numbered anew, with the first embedding rows."""
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
    """What the adapted model gives for one side's identity, with a few layers."""
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
    """The same of the source, in KerasHub's model; `None` when it has none for it."""
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
    found = live_layers(backbone)
    tensors = _slice_tensors(source.tensors, layers)
    rows = weight_maps.expand(weight_maps.GEMMA2_KERAS_HUB, len(layers))
    for ours, (name, rule) in rows.items():
        array = CastTensor(tensors[ours], dtype).read().astype("float32")
        found[name].weights[0].assign(rule.to_theirs(array, stack.head_dim))
    return backbone


def causal_encoder_states(backbone, token_ids):
    """The encoder run as the decoder-only model it came from.

    Args:
        backbone: a `Backbone`.
        token_ids: int `(B, T)`.

    Returns:
        `(B, T, D)`: hidden states under a causal mask, after the final norm.
    """
    tower = backbone.encoder
    positions = ops.arange(token_ids.shape[1])
    masks = {
        "full_attention": causal_mask(positions, positions)[None],
        "sliding_attention": causal_mask(
            positions, positions, tower.stack.sliding_window
        )[None],
    }
    angles = tower._angles(positions)
    x = tower._embed(ops.convert_to_tensor(token_ids), False)
    for block, kind in zip(tower.blocks, tower.stack.layer_types, strict=True):
        x = block(x, attention_mask=masks[kind], angles=angles)
    return tower.final_norm(x)


def decoder_logits_without_cross(backbone, token_ids):
    """The decoder's logits with its cross-attention silenced.

    Args:
        backbone: a `Backbone`; its cross-attention norms are changed for the call.
        token_ids: int `(B, T)`.

    Returns:
        `(B, T, V)` soft-capped logits.
    """
    scales = [block.post_cross_norm.scale for block in backbone.decoder.blocks]
    kept = [ops.copy(scale.value) for scale in scales]
    width = backbone.config.encoder.hidden_dim
    memory = keras.random.normal((token_ids.shape[0], 3, width), seed=0)
    ones = np.ones_like(token_ids)
    try:
        for scale in scales:
            scale.assign(-ops.ones(scale.shape))  # RMSNorm multiplies by 1 + scale.
        hidden = backbone.decode(token_ids, ones, memory, ones[:, :3])
        return backbone.logits(hidden)
    finally:
        for scale, value in zip(scales, kept, strict=True):
            scale.assign(value)

"""Weight maps as tables: (our variable path, their tensor name, rule).

`{i}` runs over the layers of a tower; `{_i}` is how Keras numbers repeated layers
in a file: nothing, `_1`, `_2`, ... The rules are those of `rules.RULES`, and each
of them reads in both directions.
"""

from keras_t5gemma.checkpoints.layout_transforms import RULES
from keras_t5gemma.checkpoints.lazy_tensors import FromTheirs, ToTheirs

_HF_ATTENTION = (
    ("query/kernel", "q_proj.weight", "transpose"),
    ("key/kernel", "k_proj.weight", "transpose"),
    ("value/kernel", "v_proj.weight", "transpose"),
    ("output/kernel", "o_proj.weight", "transpose"),
)
_HF_MLP = (
    ("mlp/gate/kernel", "mlp.gate_proj.weight", "transpose"),
    ("mlp/up/kernel", "mlp.up_proj.weight", "transpose"),
    ("mlp/down/kernel", "mlp.down_proj.weight", "transpose"),
)
_HF_NORMS = (
    ("pre_self_norm/scale", "pre_self_attn_layernorm.weight", "same"),
    ("post_self_norm/scale", "post_self_attn_layernorm.weight", "same"),
    ("pre_mlp_norm/scale", "pre_feedforward_layernorm.weight", "same"),
    ("post_mlp_norm/scale", "post_feedforward_layernorm.weight", "same"),
)
_HF_CROSS_NORMS = (
    ("pre_cross_norm/scale", "pre_cross_attn_layernorm.weight", "same"),
    ("post_cross_norm/scale", "post_cross_attn_layernorm.weight", "same"),
)
_HUB_ATTENTION = (
    ("query/kernel", "query_dense/vars/0", "heads_out"),
    ("key/kernel", "key_dense/vars/0", "heads_out"),
    ("value/kernel", "value_dense/vars/0", "heads_out"),
    ("output/kernel", "output_dense/vars/0", "heads_in"),
)
_HUB_MLP = (
    ("mlp/gate/kernel", "mlp/gate_proj/vars/0", "same"),
    ("mlp/up/kernel", "mlp/up_proj/vars/0", "same"),
    ("mlp/down/kernel", "mlp/down_proj/vars/0", "same"),
)
_HUB_NORMS = (
    ("pre_self_norm/scale", "pre_self_attn_layernorm/vars/0", "same"),
    ("post_self_norm/scale", "post_self_attn_layernorm/vars/0", "same"),
    ("pre_mlp_norm/scale", "pre_feedforward_layernorm/vars/0", "same"),
    ("post_mlp_norm/scale", "post_feedforward_layernorm/vars/0", "same"),
)
_HUB_CROSS_NORMS = (
    ("pre_cross_norm/scale", "pre_cross_attn_layernorm/vars/0", "same"),
    ("post_cross_norm/scale", "post_cross_attn_layernorm/vars/0", "same"),
)
_OUR_ATTENTION = (
    ("query/kernel", "query/vars/0", "same"),
    ("key/kernel", "key/vars/0", "same"),
    ("value/kernel", "value/vars/0", "same"),
    ("output/kernel", "output_projection/vars/0", "same"),
)
_OUR_MLP = (
    ("mlp/gate/kernel", "mlp/gate/vars/0", "same"),
    ("mlp/up/kernel", "mlp/up/vars/0", "same"),
    ("mlp/down/kernel", "mlp/down/vars/0", "same"),
)
_OUR_NORMS = (
    ("pre_self_norm/scale", "pre_self_norm/vars/0", "same"),
    ("post_self_norm/scale", "post_self_norm/vars/0", "same"),
    ("pre_mlp_norm/scale", "pre_mlp_norm/vars/0", "same"),
    ("post_mlp_norm/scale", "post_mlp_norm/vars/0", "same"),
)
_OUR_CROSS_NORMS = (
    ("pre_cross_norm/scale", "pre_cross_norm/vars/0", "same"),
    ("post_cross_norm/scale", "post_cross_norm/vars/0", "same"),
)


_GEMMA2_HF_NORMS = (
    ("pre_self_norm/scale", "input_layernorm.weight", "same"),
    ("post_self_norm/scale", "post_attention_layernorm.weight", "same"),
    ("pre_mlp_norm/scale", "pre_feedforward_layernorm.weight", "same"),
    ("post_mlp_norm/scale", "post_feedforward_layernorm.weight", "same"),
)
_GEMMA2_HUB_ATTENTION = (
    ("query/kernel", "query_dense/vars/0", "heads_first"),
    ("key/kernel", "key_dense/vars/0", "heads_first"),
    ("value/kernel", "value_dense/vars/0", "heads_first"),
    ("output/kernel", "output_dense/vars/0", "heads_in"),
)
_GEMMA2_HUB_MLP = (
    ("mlp/gate/kernel", "gating_ffw/vars/0", "same"),
    ("mlp/up/kernel", "gating_ffw_2/vars/0", "same"),
    ("mlp/down/kernel", "ffw_linear/vars/0", "same"),
)
_GEMMA2_HUB_NORMS = (
    ("pre_self_norm/scale", "pre_attention_norm/vars/0", "same"),
    ("post_self_norm/scale", "post_attention_norm/vars/0", "same"),
    ("pre_mlp_norm/scale", "pre_ffw_norm/vars/0", "same"),
    ("post_mlp_norm/scale", "post_ffw_norm/vars/0", "same"),
)


def _under(ours, theirs, rows):
    return tuple((ours + a, theirs + b, rule) for a, b, rule in rows)


def _tower(ours, embedding, final_norm, layer, rows, attention, cross_attention=None):
    """Rows of a tower: `ours` is the prefix of our paths, the others are theirs."""
    block = ours + "block_{i}/"
    name, attention_rows = attention
    table = (
        (ours + "token_embedding/embeddings", embedding, "same"),
        (ours + "final_norm/scale", final_norm, "same"),
        *_under(block, layer, rows),
        *_under(block + "self_attention/", layer + name, attention_rows),
    )
    if cross_attention:
        table += _under(
            block + "cross_attention/", layer + cross_attention, attention_rows
        )
    return table


def _hf_encoder(prefix):
    return _tower(
        "encoder/",
        prefix + "embed_tokens.weight",
        prefix + "norm.weight",
        prefix + "layers.{i}.",
        _HF_MLP + _HF_NORMS,
        ("self_attn.", _HF_ATTENTION),
    )


# transformers' T5GemmaForConditionalGeneration, 4.53 to 5.x.
HUGGING_FACE = {
    "encoder": _hf_encoder("model.encoder."),
    "decoder": _tower(
        "decoder/",
        "model.decoder.embed_tokens.weight",
        "model.decoder.norm.weight",
        "model.decoder.layers.{i}.",
        _HF_MLP + _HF_NORMS + _HF_CROSS_NORMS,
        ("self_attn.", _HF_ATTENTION),
        cross_attention="cross_attn.",
    ),
}
# transformers' T5GemmaEncoderModel.
HUGGING_FACE_ENCODER = {"encoder": _hf_encoder("encoder.")}
# The logit table is the decoder's embedding table; some files hold it twice.
HUGGING_FACE_DROPPED = ("lm_head.out_proj.weight",)

# KerasHub 0.32's T5GemmaBackbone, in its weight files.
KERAS_HUB = {
    "encoder": _tower(
        "encoder/",
        "layers/embedding/vars/0",
        "layers/rms_normalization/vars/0",
        "layers/t5_gemma_encoder_layer{_i}/",
        _HUB_MLP + _HUB_NORMS,
        ("self_attn/", _HUB_ATTENTION),
    ),
    "decoder": _tower(
        "decoder/",
        "layers/reversible_embedding/vars/0",
        "layers/rms_normalization_1/vars/0",
        "layers/t5_gemma_decoder_layer{_i}/",
        _HUB_MLP + _HUB_NORMS + _HUB_CROSS_NORMS,
        ("self_attn/", _HUB_ATTENTION),
        cross_attention="cross_attn/",
    ),
}

# Our own Backbone, in its weight files.
KERAS = {
    "encoder": _tower(
        "encoder/",
        "layers/encoder/token_embedding/vars/0",
        "layers/encoder/final_norm/vars/0",
        "layers/encoder/blocks/encoder_block{_i}/",
        _OUR_MLP + _OUR_NORMS,
        ("self_attention/", _OUR_ATTENTION),
    ),
    "decoder": _tower(
        "decoder/",
        "layers/decoder/token_embedding/vars/0",
        "layers/decoder/final_norm/vars/0",
        "layers/decoder/blocks/decoder_block{_i}/",
        _OUR_MLP + _OUR_NORMS + _OUR_CROSS_NORMS,
        ("self_attention/", _OUR_ATTENTION),
        cross_attention="cross_attention/",
    ),
}

# Decoder-only Gemma 2, under the names our towers have: transformers' Gemma2Model.
GEMMA2_HUGGING_FACE = _tower(
    "",
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.{i}.",
    _HF_MLP + _GEMMA2_HF_NORMS,
    ("self_attn.", _HF_ATTENTION),
)
GEMMA2_HUGGING_FACE_DROPPED = ("lm_head.weight",)  # The embedding table again.
# KerasHub's GemmaBackbone, in its weight files.
GEMMA2_KERAS_HUB = _tower(
    "",
    "layers/reversible_embedding/vars/0",
    "layers/rms_normalization/vars/0",
    "layers/gemma_decoder_block{_i}/",
    _GEMMA2_HUB_MLP + _GEMMA2_HUB_NORMS,
    ("attention/", _GEMMA2_HUB_ATTENTION),
)


def expand(rows, num_layers):
    """One entry a tensor: `{our path: (their name, rule)}` of a tower's rows."""
    table = {}
    for ours, theirs, rule in rows:
        for i in range(num_layers if "{i}" in ours else 1):
            suffix = f"_{i}" if i else ""
            table[ours.format(i=i)] = (theirs.format(i=i, _i=suffix), RULES[rule])
    return table


def tower_shapes(stack, vocabulary_size, memory_dim=None):
    """Shapes of a tower's variables by path, without the tower's name.

    Args:
        stack: the tower's `StackConfig`.
        vocabulary_size: V.
        memory_dim: width of the encoder that a decoder reads; `None` for a tower
            without cross-attention.
    """
    d, f = stack.hidden_dim, stack.intermediate_dim
    n, k = (
        heads * stack.head_dim
        for heads in (stack.num_query_heads, stack.num_key_value_heads)
    )
    block = {"mlp/gate/kernel": (d, f), "mlp/up/kernel": (d, f)}
    block["mlp/down/kernel"] = (f, d)
    sub_layers = ["self", "mlp"]
    widths = {"self": d}
    if memory_dim is not None:
        sub_layers.append("cross")
        widths["cross"] = memory_dim
    for name in sub_layers:
        block |= {f"{place}_{name}_norm/scale": (d,) for place in ("pre", "post")}
    for name, width in widths.items():
        block[f"{name}_attention/query/kernel"] = (d, n)
        block[f"{name}_attention/key/kernel"] = (width, k)
        block[f"{name}_attention/value/kernel"] = (width, k)
        block[f"{name}_attention/output/kernel"] = (n, d)
    shapes = {"token_embedding/embeddings": (vocabulary_size, d)}
    for i in range(stack.num_layers):
        shapes |= {f"block_{i}/{leaf}": shape for leaf, shape in block.items()}
    shapes["final_norm/scale"] = (d,)
    return shapes


def model_shapes(config):
    """Shapes of all variables of a `Backbone` by path, in forward order."""
    e, d, size = config.encoder, config.decoder, config.vocabulary_size
    towers = {"encoder": tower_shapes(e, size)}
    if d is not None:
        towers["decoder"] = tower_shapes(d, size, e.hidden_dim)
    return {
        f"{side}/{path}": shape
        for side, shapes in towers.items()
        for path, shape in shapes.items()
    }


def read_tower(rows, stack, shapes, entries, dropped, source):
    """Our tensors, unread, of a checkpoint's entries.

    Args:
        rows: `{our path: (their name, rule)}`, of `expand`.
        stack: the `StackConfig` whose `head_dim` the rules split by, by path prefix:
            `{prefix: StackConfig}`.
        shapes: `{our path: shape}` that the configuration asks for.
        entries: `{their name: tensor}` of the files.
        dropped: names of theirs that are left out on purpose.
        source: what to call the checkpoint in messages.

    Returns:
        `{our path: tensor}` in the order of `shapes`.

    Raises:
        ValueError: listing what is missing, extra or misshapen; every variable has
            one tensor of its shape, and every tensor one variable.
    """
    problems = []
    unmapped = sorted(set(shapes) ^ set(rows))
    if unmapped:
        problems.append(f"the weight map does not fit the model: {unmapped}")
    wanted = {theirs for theirs, _ in rows.values()}
    missing = sorted(wanted - set(entries))
    extra = sorted(set(entries) - wanted - set(dropped))
    if missing:
        problems.append(f"missing tensors {missing}")
    if extra:
        problems.append(f"unexpected tensors {extra}")
    tensors = {}
    for ours, shape in shapes.items():
        theirs, rule = rows.get(ours, (None, None))
        if theirs not in entries:
            continue
        entry = entries[theirs]
        head_dim = next(s.head_dim for p, s in stack.items() if ours.startswith(p))
        needed = rule.their_shape(shape, head_dim)
        if tuple(entry.shape) != needed:
            problems.append(
                f"tensor {theirs!r} in {entry.file} has shape {tuple(entry.shape)}, "
                f"the config needs {needed}"
            )
        tensors[ours] = FromTheirs(entry, rule, shape)
    if problems:
        raise ValueError(f"{source} cannot be loaded: " + "; ".join(problems) + ".")
    return tensors


def to_theirs(table, config, tensors):
    """`{their name: tensor}` of our tensors, for export."""
    theirs = {}
    for side, rows in table.items():
        stack = getattr(config, side)
        for ours, (name, rule) in expand(rows, stack.num_layers).items():
            theirs[name] = ToTheirs(tensors[ours], rule, stack.head_dim)
    return theirs

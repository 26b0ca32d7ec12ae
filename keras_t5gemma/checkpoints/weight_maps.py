"""Weight maps as tables: (our variable path, their tensor name, rule).

`{i}` runs over the layers of the tower. A rule is its own inverse, so a table
reads in both directions.
"""

import numpy as np

RULES = {"same": np.asarray, "transpose": np.transpose}

_ATTENTION = (
    ("query/kernel", "q_proj.weight", "transpose"),
    ("key/kernel", "k_proj.weight", "transpose"),
    ("value/kernel", "v_proj.weight", "transpose"),
    ("output/kernel", "o_proj.weight", "transpose"),
)
_FEED_FORWARD = (
    ("mlp/gate/kernel", "mlp.gate_proj.weight", "transpose"),
    ("mlp/up/kernel", "mlp.up_proj.weight", "transpose"),
    ("mlp/down/kernel", "mlp.down_proj.weight", "transpose"),
)
_NORMS = (
    ("pre_self_norm/scale", "pre_self_attn_layernorm.weight", "same"),
    ("post_self_norm/scale", "post_self_attn_layernorm.weight", "same"),
    ("pre_mlp_norm/scale", "pre_feedforward_layernorm.weight", "same"),
    ("post_mlp_norm/scale", "post_feedforward_layernorm.weight", "same"),
)
_CROSS_NORMS = (
    ("pre_cross_norm/scale", "pre_cross_attn_layernorm.weight", "same"),
    ("post_cross_norm/scale", "post_cross_attn_layernorm.weight", "same"),
)


def _under(ours, theirs, rows):
    return tuple((ours + a, theirs + b, rule) for a, b, rule in rows)


def _tower(name, cross):
    block, layer = f"{name}/block_{{i}}/", f"model.{name}.layers.{{i}}."
    rows = (
        (
            f"{name}/token_embedding/embeddings",
            f"model.{name}.embed_tokens.weight",
            "same",
        ),
        (f"{name}/final_norm/scale", f"model.{name}.norm.weight", "same"),
        *_under(block, layer, _NORMS + _FEED_FORWARD),
        *_under(block + "self_attention/", layer + "self_attn.", _ATTENTION),
    )
    if cross:
        rows += _under(block, layer, _CROSS_NORMS)
        rows += _under(block + "cross_attention/", layer + "cross_attn.", _ATTENTION)
    return rows


# transformers' T5GemmaForConditionalGeneration, 4.53 to 5.x.
HUGGING_FACE = {"encoder": _tower("encoder", False), "decoder": _tower("decoder", True)}
# The logit table is the decoder's embedding table; some files hold it twice.
HUGGING_FACE_DROPPED = ("lm_head.out_proj.weight",)


def expand(table, config):
    """One row a tensor: `{our path: (their name, rule)}` for a `T5GemmaConfig`."""
    rows = {}
    for side, templates in table.items():
        for ours, theirs, rule in templates:
            layers = getattr(config, side).num_layers if "{i}" in ours else 1
            for i in range(layers):
                rows[ours.format(i=i)] = (theirs.format(i=i), rule)
    return rows


def check_coverage(rows, dropped, variables, entries, source):
    """Every variable has one tensor of its shape, every tensor one variable.

    Args:
        rows: of `expand`.
        dropped: tensor names that are left out on purpose.
        variables: our weights by path.
        entries: their tensors by name, each with a `.shape`.
        source: what to call the checkpoint in messages.

    Raises:
        ValueError: listing missing, extra and misshapen tensors.
    """
    problems = []
    unmapped = sorted(set(variables) ^ set(rows))
    if unmapped:
        problems.append(f"the weight map does not fit the model: {unmapped}")
    wanted = {theirs for theirs, _ in rows.values()}
    missing = sorted(wanted - set(entries))
    extra = sorted(set(entries) - wanted - set(dropped))
    if missing:
        problems.append(f"missing tensors {missing}")
    if extra:
        problems.append(f"unexpected tensors {extra}")
    for ours, (theirs, rule) in rows.items():
        if theirs in entries and ours in variables:
            shape = tuple(variables[ours].shape)
            theirs_shape = tuple(entries[theirs].shape)
            needed = shape[::-1] if rule == "transpose" else shape
            if theirs_shape != needed:
                problems.append(
                    f"tensor {theirs!r} has shape {theirs_shape}, the config needs "
                    f"{needed}"
                )
    if problems:
        raise ValueError(f"{source} cannot be loaded: " + "; ".join(problems) + ".")

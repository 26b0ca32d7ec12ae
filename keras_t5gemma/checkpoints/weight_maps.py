"""Weight maps as tables: (our variable path, name in the file, layout transform).

`{i}` is the number of a layer; `{_i}` is the suffix by which Keras numbers repeated
layers in a file: nothing, `_1`, `_2`, ... The transforms are those of
`layout_transforms.TRANSFORMS`, each of which works in both directions.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from keras_t5gemma.checkpoints.layout_transforms import TRANSFORMS, LayoutTransform
from keras_t5gemma.checkpoints.lazy_tensors import (
    ExportedTensor,
    ImportedTensor,
    LazyTensor,
    nbytes,
)
from keras_t5gemma.config import StackConfig, T5GemmaConfig

_COMPARED = 2**26  # Bytes that are in memory at a time to compare two tensors.
Row = tuple[str, str, str]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class BlockNames:
    """Names that a format gives the layers of one block, by our names.

    Args:
        attention: names of the projections.
        mlp: names of the feed-forward matrices.
        norms: names of the norms.
        self_attention: prefix of the self-attention's projections.
        cross_attention: prefix of the cross-attention's projections.
        suffix: of the weight of each layer.
        transforms: layout transforms by our names; those left out are stored as ours.
    """

    attention: Mapping[str, str]
    mlp: Mapping[str, str]
    norms: Mapping[str, str]
    self_attention: str
    cross_attention: str | None
    suffix: str
    transforms: Mapping[str, str]

    def rows(self, cross_attention: bool) -> tuple[Row, ...]:
        """Rows of one block, paths relative to it."""
        kinds = ("self", "cross") if cross_attention else ("self",)
        paths = {f"mlp/{name}/kernel": file for name, file in self.mlp.items()}
        for name, file in self.norms.items():
            if cross_attention or "cross" not in name:
                paths[f"{name}/scale"] = file
        for kind in kinds:
            prefix = getattr(self, f"{kind}_attention")
            for name, file in self.attention.items():
                paths[f"{kind}_attention/{name}/kernel"] = prefix + file
        return tuple(
            (path, file + self.suffix, self._transform(path))
            for path, file in paths.items()
        )

    def _transform(self, path):
        return self.transforms.get(path.split("/")[-2], "same")


_PROJECTIONS = ("query", "key", "value", "output")
_MATRICES = ("gate", "up", "down")
_NORMS = tuple(
    f"{place}_{sub_layer}_norm"
    for sub_layer in ("self", "mlp", "cross")
    for place in ("pre", "post")
)

# transformers' T5Gemma, 4.53 to 5.x.
_HUGGING_FACE = BlockNames(
    attention={name: f"{name[0]}_proj" for name in _PROJECTIONS},
    mlp={name: f"mlp.{name}_proj" for name in _MATRICES},
    norms={
        "pre_self_norm": "pre_self_attn_layernorm",
        "post_self_norm": "post_self_attn_layernorm",
        "pre_mlp_norm": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
        "pre_cross_norm": "pre_cross_attn_layernorm",
        "post_cross_norm": "post_cross_attn_layernorm",
    },
    self_attention="self_attn.",
    cross_attention="cross_attn.",
    suffix=".weight",
    transforms=dict.fromkeys(_PROJECTIONS + _MATRICES, "transpose"),
)
# KerasHub 0.32's T5GemmaBackbone, in its weight files.
_KERAS_HUB = BlockNames(
    attention={name: f"{name}_dense" for name in _PROJECTIONS},
    mlp={name: f"mlp/{name}_proj" for name in _MATRICES},
    norms=_HUGGING_FACE.norms,
    self_attention="self_attn/",
    cross_attention="cross_attn/",
    suffix="/vars/0",
    transforms={
        **dict.fromkeys(("query", "key", "value"), "heads_out"),
        "output": "heads_in",
    },
)
# Our own Backbone, in its weight files: attributes instead of layer names.
_KERAS = BlockNames(
    attention={**{n: n for n in _PROJECTIONS}, "output": "output_projection"},
    mlp={name: f"mlp/{name}" for name in _MATRICES},
    norms={name: name for name in _NORMS},
    self_attention="self_attention/",
    cross_attention="cross_attention/",
    suffix="/vars/0",
    transforms={},
)
# Decoder-only Gemma 2: transformers' Gemma2Model.
_GEMMA2_HUGGING_FACE = dataclasses.replace(
    _HUGGING_FACE,
    norms={
        **_HUGGING_FACE.norms,
        "pre_self_norm": "input_layernorm",
        "post_self_norm": "post_attention_layernorm",
    },
    cross_attention=None,
)
# Decoder-only Gemma 2: KerasHub's GemmaBackbone, in its weight files.
_GEMMA2_KERAS_HUB = dataclasses.replace(
    _KERAS_HUB,
    mlp={"gate": "gating_ffw", "up": "gating_ffw_2", "down": "ffw_linear"},
    norms={
        "pre_self_norm": "pre_attention_norm",
        "post_self_norm": "post_attention_norm",
        "pre_mlp_norm": "pre_ffw_norm",
        "post_mlp_norm": "post_ffw_norm",
    },
    self_attention="attention/",
    cross_attention=None,
    transforms={
        **_KERAS_HUB.transforms,
        **dict.fromkeys(("query", "key", "value"), "heads_first"),
    },
)


def _tower(
    side: str,
    names: BlockNames,
    embedding: str,
    final_norm: str,
    block: str,
) -> tuple[Row, ...]:
    """Rows of a tower; `side` is "encoder", "decoder", or "" for Gemma 2."""
    prefix = f"{side}/" if side else ""
    rows = [("token_embedding/embeddings", embedding, "same")]
    rows += [("final_norm/scale", final_norm, "same")]
    rows += [
        ("block_{i}/" + path, block + file, transform)
        for path, file, transform in names.rows(cross_attention=side == "decoder")
    ]
    return tuple((prefix + path, file, transform) for path, file, transform in rows)


def _hugging_face(side, prefix, names=_HUGGING_FACE):
    return _tower(
        side,
        names,
        prefix + "embed_tokens.weight",
        prefix + "norm.weight",
        prefix + "layers.{i}.",
    )


# transformers' T5GemmaForConditionalGeneration.
HUGGING_FACE = {
    side: _hugging_face(side, f"model.{side}.") for side in ("encoder", "decoder")
}
# transformers' T5GemmaEncoderModel.
HUGGING_FACE_ENCODER = {"encoder": _hugging_face("encoder", "encoder.")}
# The logit table is the decoder's embedding table; some files hold it twice.
HUGGING_FACE_COPIES = {"lm_head.out_proj.weight": "model.decoder.embed_tokens.weight"}
KERAS_HUB = {
    "encoder": _tower(
        "encoder",
        _KERAS_HUB,
        "layers/embedding/vars/0",
        "layers/rms_normalization/vars/0",
        "layers/t5_gemma_encoder_layer{_i}/",
    ),
    "decoder": _tower(
        "decoder",
        _KERAS_HUB,
        "layers/reversible_embedding/vars/0",
        "layers/rms_normalization_1/vars/0",
        "layers/t5_gemma_decoder_layer{_i}/",
    ),
}
KERAS = {
    side: _tower(
        side,
        _KERAS,
        f"layers/{side}/token_embedding/vars/0",
        f"layers/{side}/final_norm/vars/0",
        f"layers/{side}/blocks/{side}_block{{_i}}/",
    )
    for side in ("encoder", "decoder")
}
# Gemma 2, under the paths that our towers have.
GEMMA2_HUGGING_FACE = _hugging_face("", "model.", _GEMMA2_HUGGING_FACE)
GEMMA2_HUGGING_FACE_COPIES = {"lm_head.weight": "model.embed_tokens.weight"}
GEMMA2_KERAS_HUB = _tower(
    "",
    _GEMMA2_KERAS_HUB,
    "layers/reversible_embedding/vars/0",
    "layers/rms_normalization/vars/0",
    "layers/gemma_decoder_block{_i}/",
)


def expand(
    rows: Iterable[Row], num_layers: int
) -> dict[str, tuple[str, LayoutTransform]]:
    """`{our path: (name in the file, transform)}`, one entry for each tensor."""
    table = {}
    for path, name, transform in rows:
        for i in range(num_layers if "{i}" in path else 1):
            suffix = f"_{i}" if i else ""
            file_name = name.format(i=i, _i=suffix)
            table[path.format(i=i)] = (file_name, TRANSFORMS[transform])
    return table


def tower_shapes(
    stack: StackConfig, vocabulary_size: int, encoder_dim: int | None = None
) -> dict[str, Shape]:
    """Shapes of a tower's variables by path, without the tower's name.

    Args:
        stack: the tower's `StackConfig`.
        vocabulary_size: V.
        encoder_dim: width of the encoder that a decoder attends to; `None` for a
            tower without cross-attention.
    """
    d, f = stack.hidden_dim, stack.intermediate_dim
    n, k = (
        heads * stack.head_dim
        for heads in (stack.num_query_heads, stack.num_key_value_heads)
    )
    block: dict[str, Shape] = {"mlp/gate/kernel": (d, f), "mlp/up/kernel": (d, f)}
    block["mlp/down/kernel"] = (f, d)
    sub_layers = ["self", "mlp"]
    widths = {"self": d}
    if encoder_dim is not None:
        sub_layers.append("cross")
        widths["cross"] = encoder_dim
    for name in sub_layers:
        block |= {f"{place}_{name}_norm/scale": (d,) for place in ("pre", "post")}
    for name, width in widths.items():
        block[f"{name}_attention/query/kernel"] = (d, n)
        block[f"{name}_attention/key/kernel"] = (width, k)
        block[f"{name}_attention/value/kernel"] = (width, k)
        block[f"{name}_attention/output/kernel"] = (n, d)
    shapes: dict[str, Shape] = {"token_embedding/embeddings": (vocabulary_size, d)}
    for i in range(stack.num_layers):
        shapes |= {f"block_{i}/{leaf}": shape for leaf, shape in block.items()}
    shapes["final_norm/scale"] = (d,)
    return shapes


def model_shapes(config: T5GemmaConfig) -> dict[str, Shape]:
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


def import_tensors(
    rows: Mapping[str, tuple[str, LayoutTransform]],
    stacks: Mapping[str, StackConfig],
    shapes: Mapping[str, Shape],
    entries: Mapping[str, LazyTensor],
    dropped: Iterable[str],
    source: str,
    copies: Mapping[str, str] | None = None,
) -> dict[str, LazyTensor]:
    """Lazily loaded tensors by our paths, in our layout, of a checkpoint's entries.

    Args:
        rows: `{our path: (name in the file, transform)}`, from `expand`.
        stacks: `{path prefix: StackConfig}`, whose `head_dim` the transforms use.
        shapes: `{our path: shape}` that the configuration asks for.
        entries: `{name in the file: tensor}`.
        dropped: names in the file that are left out on purpose.
        source: name of the checkpoint for messages.
        copies: `{name in the file: name}` of tensors that must equal another one and
            are then left out; read and compared if both are there.

    Returns:
        `{our path: tensor}` in the order of `shapes`.

    Raises:
        ValueError: listing what is missing, unexpected or misshapen: every variable
            has one tensor of its shape, and every tensor one variable.
    """
    problems = []
    unmapped = sorted(set(shapes) ^ set(rows))
    if unmapped:
        problems.append(f"the weight map does not fit the model: {unmapped}")
    wanted = {name for name, _ in rows.values()}
    missing = sorted(wanted - set(entries))
    copies = copies or {}
    extra = sorted(set(entries) - wanted - set(dropped) - set(copies))
    if missing:
        problems.append(f"missing tensors {missing}")
    if extra:
        problems.append(f"unexpected tensors {extra}")
    tensors: dict[str, LazyTensor] = {}
    for path, shape in shapes.items():
        if path not in rows or rows[path][0] not in entries:
            continue
        name, transform = rows[path]
        entry = entries[name]
        head_dim = next(s.head_dim for p, s in stacks.items() if path.startswith(p))
        needed = transform.file_shape(shape, head_dim)
        if tuple(entry.shape) != needed:
            problems.append(
                f"tensor {name!r} in {getattr(entry, 'file', source)} has shape "
                f"{tuple(entry.shape)}, the config needs {needed}"
            )
        tensors[path] = ImportedTensor(entry, transform, shape)
    for copy, name in copies.items():
        if {copy, name} <= set(entries) and not are_equal(entries[copy], entries[name]):
            problems.append(
                f"tensor {copy!r} differs from {name!r}: a separate logit table is "
                "not implemented, T5Gemma's is the embedding table"
            )
    if problems:
        raise ValueError(f"{source} cannot be loaded: " + "; ".join(problems) + ".")
    return tensors


def are_equal(a, b):
    """Whether two tensors have the same values; some rows are in memory at a time."""
    if tuple(a.shape) != tuple(b.shape):
        return False
    rows = max(1, _COMPARED // max(1, nbytes(a) // max(1, a.shape[0])))
    parts = (slice(i, i + rows) for i in range(0, a.shape[0], rows))
    return all(np.array_equal(a.read_slice((p,)), b.read_slice((p,))) for p in parts)


def export_tensors(
    table: Mapping[str, tuple[Row, ...]],
    config: T5GemmaConfig,
    tensors: Mapping[str, LazyTensor],
) -> dict[str, LazyTensor]:
    """`{name in the file: tensor}` of tensors by our paths, for export."""
    exported: dict[str, LazyTensor] = {}
    for side, rows in table.items():
        stack = getattr(config, side)
        for path, (name, transform) in expand(rows, stack.num_layers).items():
            exported[name] = ExportedTensor(tensors[path], transform, stack.head_dim)
    return exported

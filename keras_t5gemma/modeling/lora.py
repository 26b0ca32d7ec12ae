"""LoRA, low-rank adapters (arXiv 2106.09685), by part of the model."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py

from keras_t5gemma.checkpoints import h5_file, weight_maps
from keras_t5gemma.checkpoints.atomic import atomic_file
from keras_t5gemma.distribution import mesh, process_group
from keras_t5gemma.modeling import peft_adapters
from keras_t5gemma.modeling.layer_iteration import iter_layers
from keras_t5gemma.modeling.layers import Projection, TokenEmbedding, stored_weight
from keras_t5gemma.utils.checks import MAX_ROWS, one_of, whole_number
from keras_t5gemma.utils.texts import to_list

# Parts: components of the layers' paths, and the layers adapted by default.
PARTS = {
    "encoder": (("encoder", "self_attention"), ("query", "value")),
    "decoder": (("decoder", "self_attention"), ("query", "value")),
    "cross_attention": (("cross_attention",), ("query", "value")),
    "mlp": (("mlp",), ("gate", "up", "down")),
    "embeddings": (("token_embedding",), ("token_embedding",)),
}


def enable(
    backbone: Any,
    rank: int,
    names: Sequence[str] | None = None,
    parts: Sequence[str] | None = None,
) -> None:
    """Freeze all weights and add adapters to some of the layers.

    Args:
        backbone: a `Backbone`.
        rank: inner dimension of the adapters, at least 1.
        names: names of layers; `None` is the default of the parts.
        parts: keys of `PARTS`; `None` is every layer with one of the names.

    Raises:
        ValueError: for a rank below 1, or names and parts that match no layer.
    """
    rank = whole_number(rank, "rank", 1, MAX_ROWS)
    if parts is not None:
        parts = [one_of(part, "parts", PARTS) for part in _names(parts, "parts")]
    if parts is None and names is None:
        names = backbone.default_lora_layer_names()
    candidates = _candidates(backbone)
    known = {layer.name for layer in candidates}
    if names is not None:
        names = _names(names, "target_layer_names")
        for name in names:
            one_of(name, "target_layer_names", sorted(known))

    def is_chosen(layer):
        if parts is None:
            return layer.name in names
        folders = layer.path.split("/")
        return any(
            set(PARTS[part][0]) <= set(folders)
            and layer.name in (names or PARTS[part][1])
            for part in parts
        )

    chosen = [layer for layer in candidates if is_chosen(layer)]
    if not chosen:
        raise ValueError(
            f"No layer is in `parts` {parts!r} and in `target_layer_names` {names!r}."
        )
    _enable(backbone, rank, chosen)


def _names(values, name):
    """A list of names; one string would be a list of letters."""
    if isinstance(values, str):
        raise ValueError(f"`{name}` must be a list of strings; got {values!r}.")
    return to_list(values, name)


def save(backbone: Any, path: str | os.PathLike[str]) -> None:
    """Save rank and adapters of every adapted layer, to an HDF5 file or a PEFT folder.

    With several processes all of them call it; the first one writes.

    Args:
        backbone: a `Backbone`.
        path: ending in `.lora.h5`; or of a folder for the `peft` library, which
            applies it to transformers' T5Gemma.

    Raises:
        ValueError: without adapters, for another suffix, or adapters that PEFT does
            not have.
    """
    adapted = [layer for layer in _candidates(backbone) if layer.lora_enabled]
    if not adapted:
        raise ValueError("The model has no adapters: call `enable_lora(rank)` first.")
    is_folder = os.path.isdir(path) or not Path(path).suffix
    if not is_folder and not str(path).endswith(".lora.h5"):
        raise ValueError(
            "`filepath` must end in '.lora.h5', or be a folder for the files of PEFT; "
            f"got {str(path)!r}."
        )
    arrays = {
        (_key(layer), variable.name): mesh.to_numpy(variable.value)
        for layer in adapted
        for variable in _adapters(layer)
    }
    if is_folder:
        factors = {
            _key(layer): peft_adapters.Adapter(
                layer.lora_rank,
                float(layer.lora_alpha),
                *(arrays[_key(layer), v.name].astype("float32") for v in _ab(layer)),
            )
            for layer in adapted
        }
        peft_adapters.write(
            Path(path), factors, weight_maps.model_shapes(backbone.config)
        )
        return
    with process_group.all_or_none(f"{path} was saved"):
        if process_group.process_index() == 0:
            _write(path, adapted, arrays)


def _write(path, adapted, arrays):
    with atomic_file(path) as staged, h5py.File(staged, "w") as file:
        for layer in adapted:
            group = file.create_group(_key(layer))
            group.attrs["rank"] = layer.lora_rank
            group.attrs["alpha"] = layer.lora_alpha
        for (key, name), array in arrays.items():
            h5_file.add_array(file[key], name, array)


def load(backbone: Any, path: str | os.PathLike[str]) -> None:
    """Load adapters of `save`, or of a folder of PEFT, into the same layers.

    Layers without adapters get them first.

    Raises:
        ValueError: if the file is damaged, or its layers or ranks are not those of the
            model.
    """
    layers = {_key(layer): layer for layer in _candidates(backbone)}
    saved = _read_peft(backbone, path) if os.path.isdir(path) else _read(path)
    unknown = sorted(set(saved) - set(layers))
    if unknown or not saved:
        raise ValueError(
            f"{str(path)!r} has adapters of {unknown[:3] or 'no'} layers that are "
            "not in the model: it belongs to another model."
        )
    adapted = {key for key, layer in layers.items() if layer.lora_enabled}
    ranks = {rank for rank, _, _ in saved.values()}
    if not adapted:
        _enable(backbone, ranks.pop(), [layers[key] for key in saved])
    elif adapted != set(saved) or ranks != {layers[k].lora_rank for k in adapted}:
        raise ValueError(
            f"The model's adapters are not those of {str(path)!r}: the file has "
            f"{len(saved)} of rank {sorted(ranks)}, the model {len(adapted)}. "
            "Load it into a model without adapters."
        )
    for key, (_, alpha, arrays) in saved.items():
        layers[key].lora_alpha = alpha
        for variable in _adapters(layers[key]):
            variable.assign(arrays[variable.name])


def _read(path):
    """`{layer: (rank, alpha, {name: array})}` of a file, verified."""
    saved = {}

    def note(key, item):
        if "rank" in item.attrs:
            arrays = {name: dataset[()] for name, dataset in item.items()}
            for name, array in arrays.items():
                h5_file.check_array(item[name], array, f"{key}/{name}")
            rank, alpha = int(item.attrs["rank"]), item.attrs["alpha"].item()
            saved[key] = rank, alpha, arrays

    with h5_file.open_file(path) as file:
        file.visititems(note)
    return saved


def _read_peft(backbone, folder):
    shapes = weight_maps.model_shapes(backbone.config)
    found = peft_adapters.read(folder, shapes)
    layers = {_key(layer): layer for layer in _candidates(backbone)}
    return {
        key: (
            adapter.rank,
            adapter.alpha,
            dict(zip(_ab_names(layers[key]), adapter[2:], strict=True)),
        )
        for key, adapter in found.items()
    }


def _ab_names(layer):
    """Names of the two factors, the one next to the input first."""
    kind = "embeddings" if isinstance(layer, TokenEmbedding) else "kernel"
    return f"lora_{kind}_a", f"lora_{kind}_b"


def _ab(layer):
    return [stored_weight(layer, name) for name in _ab_names(layer)]


def _candidates(backbone):
    layers = iter_layers(backbone)
    return [layer for layer in layers if isinstance(layer, Projection | TokenEmbedding)]


def _enable(backbone, rank, chosen):
    for layer in iter_layers(backbone):
        layer.trainable = False
    for layer in chosen:
        layer.trainable = True
        layer.enable_lora(rank)


def _adapters(layer):
    return [v for v in layer.variables if v.name.startswith("lora_")]


def _key(layer):
    """Path of a layer from its tower on, independent of the model's name."""
    folders = layer.path.split("/")
    tower = next(f for f in folders if f in ("encoder", "decoder"))
    return "/".join(folders[folders.index(tower) :])

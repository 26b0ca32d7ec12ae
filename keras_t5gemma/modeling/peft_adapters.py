"""Adapter folders of the `peft` library, for transformers' T5Gemma.

A LoRA of PEFT adds `lora_alpha / r * B @ A` to a weight `(out, in)`, or its transpose
to an embedding; ours adds `alpha / rank * A @ B` to a kernel `(in, out)`.
"""

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_t5gemma.checkpoints import safetensors_file, weight_maps
from keras_t5gemma.checkpoints.atomic import atomic_folder
from keras_t5gemma.checkpoints.lazy_tensors import LazyTensor, VariableTensor
from keras_t5gemma.utils.checks import number, shown, whole_number
from keras_t5gemma.utils.files import read_json_file

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Our pair of factors by the names that PEFT gives them.
_FACTORS = {
    "kernel": (".lora_A.weight", ".lora_B.weight"),
    "embeddings": (".lora_embedding_A", ".lora_embedding_B"),
}
# Fields of adapter_config.json that change the network, and the values implemented.
_NEEDED: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "trainable_token_indices": ([], {}, None),
    "target_parameters": ([], None),
    "layer_replication": ([], None),
    "alora_invocation_tokens": ([], None),
    "megatron_config": (None,),
    "use_qalora": (False, None),
    # The others change the weights that the adapter is added to.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "arrow_config": (None,),
}


class Adapter(NamedTuple):
    """LoRA of one layer: `alpha / rank * first @ second` is added to its weight."""

    rank: int
    alpha: float
    first: np.ndarray
    second: np.ndarray


def read(folder: str | Path, shapes: Mapping[str, tuple]) -> dict[str, Adapter]:
    """Adapters of a PEFT folder by the paths of the layers in a `Backbone`.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        shapes: `{our variable path: shape}` of the model.

    Raises:
        ValueError: naming the field of a variant that is not implemented, layers that
            the model does not have, or factors that do not fit.
    """
    folder = Path(folder)
    file = folder / CONFIG_FILE
    config = read_json_file(file)
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object; got {shown(config)}.")
    for field, accepted in _NEEDED.items():
        if config.get(field) not in accepted:
            raise ValueError(
                f"{file} has {field} {shown(config.get(field))}; only "
                f"{accepted[0]!r} is implemented."
            )
    rank = whole_number(config.get("r"), f"{file}: r", 1)
    alpha = number(config.get("lora_alpha"), f"{file}: lora_alpha")
    if config.get("use_rslora"):
        alpha *= math.sqrt(rank)  # Scaled by 1 / sqrt(rank) instead of 1 / rank.
    if not (folder / WEIGHTS_FILE).exists():
        raise ValueError(
            f"{folder} has no {WEIGHTS_FILE}; adapters in pickles are never opened: "
            "save them as safetensors."
        )
    entries = safetensors_file.read_header(folder / WEIGHTS_FILE)
    paths = {name.removesuffix(".weight"): p for p, name in _names(shapes).items()}
    adapters, unknown = {}, set(entries)
    for module in sorted({name.rpartition(".lora_")[0] for name in entries}):
        path = paths.get(_ending(module, paths))
        if path is not None:
            _check_place(path.rpartition("/")[0], module)
        kind = "kernel" if path is None else path.rpartition("/")[2]
        names = [module + suffix for suffix in _FACTORS.get(kind, ())]
        if path is None or len(names) != 2 or set(names) - set(entries):
            continue
        unknown -= set(names)
        adapters[path.rpartition("/")[0]] = _adapter(
            [entries[name] for name in names], shapes[path], kind, rank, alpha
        )
    if unknown or not adapters:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} has {shown(sorted(unknown)[:3] or 'no adapters')}"
            ", which are not LoRA factors of layers of this model: the adapter belongs "
            "to another model."
        )
    return adapters


def _check_place(path, name):
    if path == "decoder/token_embedding":
        raise ValueError(
            f"The adapter of {name} cannot be moved between keras_t5gemma and PEFT: "
            "here it changes the logits too, there only the embedding of the input."
        )


def _names(shapes):
    """`{our variable path: name of transformers' T5GemmaForConditionalGeneration}`."""
    names = {}
    for side, rows in weight_maps.HUGGING_FACE.items():
        count = len({p.split("/")[1] for p in shapes if p.startswith(f"{side}/block_")})
        expanded = weight_maps.expand(rows, count)
        names |= {path: name for path, (name, _) in expanded.items() if path in shapes}
    return names


def _ending(module, known):
    """The known name that a module's name ends in, without the wrappers before it."""
    parts = module.removeprefix(_PREFIX).split(".")
    tails = (".".join(parts[i:]) for i in range(len(parts)))
    # An encoder alone has no `model.` before `encoder.`.
    candidates = (name for tail in tails for name in (tail, f"model.{tail}"))
    return next((name for name in candidates if name in known), module)


def _adapter(entries, shape, kind, rank, alpha):
    first, second = (np.asarray(e.read(), "float32").T for e in entries)
    wanted = (shape[0], rank), (rank, shape[1])
    if (first.shape, second.shape) != wanted:
        a, b = entries
        raise ValueError(
            f"{a.file} has factors {a.name!r} {tuple(a.shape)} and {b.name!r} "
            f"{tuple(b.shape)}; the layer and r need {wanted[0][::-1]} and "
            f"{wanted[1][::-1]}."
        )
    return Adapter(rank, alpha, first, second)


def write(
    folder: str | Path,
    adapters: Mapping[str, Adapter],
    shapes: Mapping[str, tuple],
) -> None:
    """Write adapters as a PEFT folder for transformers' T5Gemma: atomic.

    Args:
        folder: path.
        adapters: `{path of a layer: adapter}`, of one rank and alpha.
        shapes: `{our variable path: shape}` of the model.

    Raises:
        ValueError: if ranks or alphas differ between layers, or for an adapter of
            the decoder's embedding, which PEFT does not apply to the logits.
    """
    scales = {(a.rank, a.alpha) for a in adapters.values()}
    if len(scales) > 1:
        raise ValueError(
            "Adapters of one rank and alpha can be saved for PEFT; these have "
            f"(rank, alpha) {sorted(scales)}."
        )
    ((rank, alpha),) = scales
    names = _names(shapes)
    is_pair = any(path.startswith("decoder/") for path in shapes)
    entries: dict[str, LazyTensor] = {}
    targets = []
    for path, adapter in adapters.items():
        _check_place(path, path)
        kind = "kernel" if f"{path}/kernel" in names else "embeddings"
        name = names[f"{path}/{kind}"].removesuffix(".weight")
        name = name if is_pair else name.removeprefix("model.")
        targets.append(name)
        factors = (adapter.first.T, adapter.second.T)
        for suffix, array in zip(_FACTORS[kind], factors, strict=True):
            array = np.ascontiguousarray(array)
            entries[_PREFIX + name + suffix] = VariableTensor(
                functools.partial(np.asarray, array), array.shape, "float32"
            )
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if is_pair else "FEATURE_EXTRACTION",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": targets,
    }
    with atomic_folder(folder) as staging:
        safetensors_file.write_file(staging / WEIGHTS_FILE, entries, lambda *_: None)
        text = json.dumps(config, indent=2) + "\n"
        (staging / CONFIG_FILE).write_text(text, encoding="utf-8")

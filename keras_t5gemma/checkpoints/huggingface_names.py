"""Names of transformers' T5Gemma tensors, whatever model they were saved from.

`T5GemmaForConditionalGeneration` has `model.encoder.layers...`, `T5GemmaModel` and
`T5GemmaEncoderModel` have `encoder.layers...`, a `T5GemmaEncoder` alone `layers...`,
other programs more before that. Names are compared from their ends.
"""

import re
import warnings
from collections.abc import Container, Iterable
from pathlib import Path

import numpy as np

from keras_t5gemma.checkpoints import safetensors_file, weight_maps
from keras_t5gemma.checkpoints.lazy_tensors import LazyTensor
from keras_t5gemma.checkpoints.presets import Source
from keras_t5gemma.config import STACKS, StackConfig, T5GemmaConfig

_TOWERS = ("encoder", "decoder")
_PREFIXES = ("", "model.", "model.encoder.")
# Parts of models for classification, which are not those of a backbone.
HEAD = re.compile(r"(.*\.)?(score|classifier)\.(out_proj\.)?(weight|bias)")
_LM_HEAD = "lm_head.out_proj.weight"
_TABLE = "model.decoder.embed_tokens.weight"


class Names:
    """Names of `T5GemmaForConditionalGeneration` by those of other models.

    Args:
        known: names that are possible.
    """

    def __init__(self, known: Iterable[str]):
        self.known = {*known, _LM_HEAD, _TABLE}

    def find(self, name: str) -> str:
        """The known name of a tensor; or the name itself."""
        parts = name.split(".")
        for i, part in enumerate(parts):
            tail = ".".join(parts[i:])
            for prefix in _PREFIXES:
                if prefix + tail in self.known:
                    return prefix + tail
            if part in _TOWERS:  # A decoder's layers are not an encoder's.
                break
        return name

    def read(
        self, folder: Path, wanted: Container[str] | None, source: Source
    ) -> dict[str, LazyTensor]:
        """Lazily loaded tensors of a folder or of one file, by known names.

        Heads for classification are left out, with a warning that names them.

        Args:
            folder: path.
            wanted: known names that are needed; `None` for all.
            source: of the checkpoint.

        Raises:
            ValueError: if two tensors of different values have one name.
        """
        if folder.is_file():
            found = safetensors_file.read_header(folder)
        else:
            needed = None if wanted is None else _Found(self, wanted)
            found = safetensors_file.read_folder(folder, needed)
        entries: dict[str, LazyTensor] = {}
        first: dict[str, str] = {}
        for name, entry in found.items():
            known = self.find(name)
            if known in entries and not weight_maps.are_equal(entries[known], entry):
                raise ValueError(
                    f"{folder} has two sets of weights that differ: {first[known]!r} "
                    f"and {name!r} are both {known!r}."
                )
            entries.setdefault(known, entry)
            first.setdefault(known, name)
        heads = sorted(name for name in entries if HEAD.fullmatch(name))
        if heads and not source.takes_head:
            warnings.warn(
                f"{folder} has a head for classification, {', '.join(heads)}, which "
                "is not part of a Backbone and is not loaded.",
                stacklevel=2,
            )
        entries = {n: e for n, e in entries.items() if n not in heads}
        held = {_TABLE, _LM_HEAD} & set(entries)
        if wanted is not None or len(held) != 1:
            return entries
        if source.config.get("tie_word_embeddings") is False:
            warnings.warn(
                f"{folder} has a separate logit table according to config.json "
                f"(tie_word_embeddings is false), but only {min(held)!r}: it is used "
                "for both, as it was when the file was saved.",
                stacklevel=2,
            )
        if _TABLE not in entries:
            entries[_TABLE] = entries[_LM_HEAD]  # The file kept one name of two.
        return entries


class _Found:
    """Container of the names in a file whose known name is wanted."""

    def __init__(self, names, wanted):
        self.names, self.wanted = names, wanted

    def __contains__(self, name):
        return self.names.find(name) in self.wanted


def read_head(
    source: Source, width: int, classes: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Matrix `(classes, width)` and bias of a head for classification.

    Raises:
        ValueError: naming a head that is missing or has another shape.
    """
    folder = source.download()
    found = safetensors_file.read_folder(folder, _Heads())
    heads = {name: entry for name, entry in found.items() if HEAD.fullmatch(name)}
    weights = [entry for name, entry in heads.items() if name.endswith("weight")]
    biases = [entry for name, entry in heads.items() if name.endswith("bias")]
    shapes = {name: tuple(entry.shape) for name, entry in heads.items()}
    fits = [w.shape for w in weights] == [(classes, width)]
    if not fits or any(tuple(b.shape) != (classes,) for b in biases):
        raise ValueError(
            f"{folder} must have a head of {classes} classes for width {width}, "
            f"({classes}, {width}); it has {shapes or 'none'}."
        )
    return weights[0].read(), biases[0].read() if biases else None


class _Heads:
    """Container of the names of heads."""

    def __contains__(self, name):
        return HEAD.fullmatch(name) is not None


def read_size(source: Source) -> tuple[T5GemmaConfig, str]:
    """Config and dtype of one weight file, from the shapes of its tensors.

    Args:
        source: of one file; its `config` may hold the `config` that a user gave: a
            size of `STACKS`, a pair of them like `"9b-2b"`, or a `T5GemmaConfig`.

    Raises:
        ValueError: for shapes that are those of no released size.
    """
    found = safetensors_file.read_header(Path(source.location))
    rows = {n for side in weight_maps.HUGGING_FACE.values() for _, n, _ in side}
    known = {row.format(i=i) for row in rows for i in range(100)}
    names = Names(known)
    shapes = {names.find(name): tuple(entry.shape) for name, entry in found.items()}
    given = source.config.get("config")
    dtype = str(np.dtype(next(iter(found.values())).dtype).name) if found else "float32"
    sides = [s for s in _TOWERS if f"model.{s}.norm.weight" in shapes]
    table = shapes.get(f"model.{sides[-1]}.embed_tokens.weight") if sides else None
    table = table or shapes.get(_LM_HEAD)
    if "encoder" not in sides or table is None:
        raise ValueError(f"{source.location} has no tensors of a T5Gemma encoder.")
    if isinstance(given, T5GemmaConfig):
        return given, dtype
    sizes = dict.fromkeys(sides, given)
    if isinstance(given, str) and "-" in given:
        sizes = dict(zip(_TOWERS, given.split("-", 1), strict=True))
    stacks = {s: _size(source.location, shapes, s, sizes.get(s)) for s in sides}
    config = T5GemmaConfig(stacks["encoder"], stacks.get("decoder"), table[0])
    return config, dtype


def _size(location, shapes, side, given) -> StackConfig:
    if given is not None:
        if not isinstance(given, str) or given.lower() not in STACKS:
            raise ValueError(
                f"`config` must be one of {', '.join(STACKS)}, two of them like "
                f"'9b-2b', or a T5GemmaConfig; got {given!r}."
            )
        return STACKS[given.lower()]
    prefix = f"model.{side}.layers"
    layers = {n.split(".")[3] for n in shapes if n.startswith(prefix)}
    first = f"{prefix}.0"
    heads = [shapes.get(f"{first}.self_attn.{p}_proj.weight", (0,))[0] for p in "qk"]
    gate = shapes.get(f"{first}.mlp.gate_proj.weight", (0, 0))
    measured = (len(layers), gate[1], gate[0], *heads)
    for stack in STACKS.values():
        counts = (stack.num_query_heads, stack.num_key_value_heads)
        width = (count * stack.head_dim for count in counts)
        sizes = (stack.num_layers, stack.hidden_dim, stack.intermediate_dim, *width)
        if sizes == measured:
            return stack
    raise ValueError(
        f"{location}: its {side} has {measured[0]} layers of width {measured[1]}, "
        f"feed-forward {measured[2]}, queries {measured[3]} and keys {measured[4]}, "
        "which is no released size; pass `config`, a T5GemmaConfig."
    )

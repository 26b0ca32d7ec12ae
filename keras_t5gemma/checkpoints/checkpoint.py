"""T5Gemma checkpoints of any supported format, with lazily loaded tensors."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras

from keras_t5gemma.checkpoints import (
    h5_file,
    huggingface,
    huggingface_names,
    integrity,
    keras_hub_format,
    presets,
    weight_maps,
)
from keras_t5gemma.checkpoints.lazy_tensors import (
    DTYPES,
    FileTensor,
    LazyTensor,
    parse_policy,
)
from keras_t5gemma.config import StackConfig, T5GemmaConfig
from keras_t5gemma.utils.checks import json_object, string
from keras_t5gemma.utils.files import named_values

_TABLES = {
    presets.KERAS: weight_maps.KERAS,
    presets.KERAS_HUB: weight_maps.KERAS_HUB,
    presets.HUGGING_FACE: weight_maps.HUGGING_FACE,
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint, before any weight is read.

    Args:
        source: where its files are, from `presets.resolve`.
        config: `T5GemmaConfig`.
        stored_dtype: dtype of the weights according to config.json, or
            `"quantized"`.
        lineage: dict of what the model was adapted from, or `None`.
    """

    source: presets.Source
    config: T5GemmaConfig
    stored_dtype: str
    lineage: dict[str, Any] | None = None

    @property
    def location(self) -> str:
        """Folder or handle."""
        return self.source.location

    @property
    def format(self) -> str:
        """`presets.KERAS`, `KERAS_HUB` or `HUGGING_FACE`."""
        return self.source.format

    @property
    def is_quantized(self) -> bool:
        """Whether the weights are integers with scales."""
        return self.stored_dtype == "quantized"

    def saved_policy(self) -> keras.DTypePolicy:
        """Dtype policy that a preset of keras_t5gemma was saved with."""
        return parse_policy(self.source.config["config"]["dtype"])

    def tensors(self, encoder_only: bool = False) -> dict[str, LazyTensor]:
        """Lazily loaded tensors by our variable paths; downloads files if needed.

        Args:
            encoder_only: leave the decoder out; shards that hold only decoder
                tensors are not opened.

        Raises:
            ValueError: naming the file and the tensors that do not fit the config.
        """
        if self.is_quantized:
            raise ValueError(
                f"{self.location} holds quantized weights, which only `from_preset` "
                "can load, as they are."
            )
        folder = self.source.download()
        dropped: set[str] = set()
        copies: dict[str, str] = {}
        rows: dict[str, Any] = {}
        stacks: dict[str, StackConfig] = {}
        for side, templates in _TABLES[self.format].items():
            stack = getattr(self.config, side)
            if stack is None:
                continue
            expanded = weight_maps.expand(templates, stack.num_layers)
            if encoder_only and side == "decoder":
                dropped |= {name for name, _ in expanded.values()}
            else:
                rows |= expanded
                stacks[f"{side}/"] = stack
        wanted = {name for name, _ in rows.values()} if encoder_only else None
        if self.format == presets.HUGGING_FACE:
            # Without the decoder's table the copy cannot be compared, and is dropped.
            copies = weight_maps.HUGGING_FACE_COPIES
            if "decoder/" not in stacks:
                dropped |= set(copies)
            names = huggingface_names.Names({n for n, _ in rows.values()} | dropped)
            entries: Mapping[str, LazyTensor]
            entries = names.read(folder, wanted, self.source)
        else:
            entries = h5_file.read_folder(folder, wanted)
        shapes = {
            path: shape
            for path, shape in weight_maps.model_shapes(self.config).items()
            if path.startswith(tuple(stacks))
        }
        return weight_maps.import_tensors(
            rows,
            stacks,
            shapes,
            entries,
            dropped,
            self.location,
            copies if "decoder/" in stacks else {},
        )

    def checked_tensors(
        self,
        encoder_only: bool = False,
        verify_checksums: bool = True,
        allow_non_finite: bool = False,
        advise: bool = False,
    ) -> dict[str, LazyTensor]:
        """`tensors`, which raise when damaged values are read.

        Args:
            encoder_only: as in `tensors`.
            verify_checksums: compare what is read with the preset's checksums.
            allow_non_finite: warn about NaN and infinite weights instead of raising.
            advise: see `integrity.checked`.
        """
        tensors = self.tensors(encoder_only)
        checksums = self.checksums() if verify_checksums else None
        return integrity.checked(tensors, checksums, allow_non_finite, advise)

    def checksums(self, part: str = integrity.TENSORS) -> integrity.Checksums | None:
        """CRC-32 of the tensors, which presets of keras_t5gemma have.

        Args:
            part: see `integrity.read_checksums`.
        """
        if self.format != presets.KERAS:
            return None
        return integrity.read_checksums(self.source.download(), True, part)

    def quantized_tensors(self, encoder_only: bool = False) -> dict[str, FileTensor]:
        """Lazily loaded tensors of a quantized preset by their names in its files."""
        folder = self.source.download()
        entries = h5_file.read_folder(folder, quantized=True)
        if not encoder_only:
            return entries
        return {n: t for n, t in entries.items() if n.startswith("layers/encoder/")}


def open_checkpoint(preset: presets.PresetLike) -> Checkpoint:
    """Open the checkpoint of a name, folder or handle; see `presets.resolve`.

    Raises:
        ValueError: if it is not a T5Gemma checkpoint, or has a wrong config.json.
        OSError: when a download fails, with instructions.
    """
    source = presets.resolve(preset)
    file = f"{source.location}: config.json"
    with named_values(file):
        return _open(source, file)


def _open(source, file):
    if source.format == presets.HUGGING_FACE:
        fields = source.config
        if presets.is_single_file(source.location):
            return Checkpoint(source, *huggingface_names.read_size(source))
        stored = fields.get("dtype") or fields.get("torch_dtype") or "float32"
        stored = string(stored, "dtype")
        return Checkpoint(source, huggingface.read_config(fields, file), stored)
    fields = json_object(source.config.get("config"), "config")
    stored = _stored_dtype(fields)
    if source.format == presets.KERAS_HUB:
        return Checkpoint(source, keras_hub_format.read_config(fields, file), stored)
    if "config" not in fields:
        raise ValueError(f"{file} lacks the field 'config'.")
    try:
        config = T5GemmaConfig.from_dict(fields["config"])
    except TypeError as error:
        raise ValueError(f"{file} lacks a field: {error}.") from error
    if fields.get("lineage") is not None:
        json_object(fields["lineage"], "lineage")
    return Checkpoint(source, config, stored, fields.get("lineage"))


def _stored_dtype(fields):
    policy = parse_policy(fields.get("dtype"))
    is_plain = type(policy) is keras.DTypePolicy and policy.variable_dtype in DTYPES
    return policy.variable_dtype if is_plain else "quantized"

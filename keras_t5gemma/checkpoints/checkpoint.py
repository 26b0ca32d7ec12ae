"""A T5Gemma checkpoint of any supported format, opened: tensors found, not read."""

import dataclasses

import keras

from keras_t5gemma.checkpoints import (
    h5_file,
    huggingface,
    keras_hub_format,
    presets,
    safetensors_file,
    weight_maps,
)
from keras_t5gemma.checkpoints.lazy_tensors import DTYPES
from keras_t5gemma.config import T5GemmaConfig

_TABLES = {
    presets.KERAS: weight_maps.KERAS,
    presets.KERAS_HUB: weight_maps.KERAS_HUB,
    presets.HUGGING_FACE: weight_maps.HUGGING_FACE,
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What is known before any weight is read.

    Args:
        location: folder or handle.
        format: `presets.KERAS`, `KERAS_HUB` or `HUGGING_FACE`.
        config: `T5GemmaConfig`.
        stored_dtype: what config.json says of the weights: a dtype name, or
            `"quantized"`.
        lineage: dict of what the model was adapted from, or `None`.
    """

    location: str
    format: str
    config: T5GemmaConfig
    stored_dtype: str
    lineage: dict | None = None

    @property
    def is_quantized(self):
        """Whether the weights are integers with scales."""
        return self.stored_dtype == "quantized"

    def saved_policy(self):
        """The dtype policy that a preset of ours was saved with."""
        fields = presets.read_json(self.location)["config"]
        return keras.dtype_policies.get(fields["dtype"])

    def _table(self):
        if self.format == presets.HUGGING_FACE and self.config.decoder is None:
            return weight_maps.HUGGING_FACE_ENCODER
        return _TABLES[self.format]

    def tensors(self, encoder_only=False):
        """`{our variable path: unread tensor}`; downloads the files if need be.

        Args:
            encoder_only: leave the decoder out; shards that hold only decoder
                tensors are then not opened.

        Raises:
            ValueError: naming the file and the tensors that do not fit the config.
        """
        if self.is_quantized:
            raise ValueError(
                f"{self.location} holds quantized weights, which can only be loaded "
                "as they are, by `from_preset`."
            )
        folder = presets.download(self.location)
        table, dropped, sides = self._table(), set(), {}
        rows = {}
        for side, templates in table.items():
            stack = getattr(self.config, side)
            if stack is None:
                continue
            expanded = weight_maps.expand(templates, stack.num_layers)
            if encoder_only and side == "decoder":
                dropped |= {theirs for theirs, _ in expanded.values()}
            else:
                rows |= expanded
                sides[f"{side}/"] = stack
        wanted = {theirs for theirs, _ in rows.values()} if encoder_only else None
        if self.format == presets.HUGGING_FACE:
            dropped |= set(weight_maps.HUGGING_FACE_DROPPED)
            entries = safetensors_file.read_folder(folder, wanted)
        else:
            entries = h5_file.read_folder(folder, wanted)
        shapes = {
            path: shape
            for path, shape in weight_maps.model_shapes(self.config).items()
            if path.startswith(tuple(sides))
        }
        return weight_maps.import_tensors(
            rows, sides, shapes, entries, dropped, self.location
        )


def open_checkpoint(preset):
    """The `Checkpoint` of a name, folder or handle; see `presets.resolve`.

    Raises:
        ValueError: for what is no T5Gemma checkpoint, or has a wrong config.json.
        OSError: when a download fails, with what to do.
    """
    location, kind = presets.resolve(preset)
    config = presets.read_json(location)
    source = f"{location}: config.json"
    if kind == presets.HUGGING_FACE:
        stored = config.get("dtype") or config.get("torch_dtype") or "float32"
        return Checkpoint(
            location, kind, huggingface.read_config(config, source), stored
        )
    fields = config.get("config") or {}
    stored = _stored_dtype(fields)
    if kind == presets.KERAS_HUB:
        return Checkpoint(
            location, kind, keras_hub_format.read_config(fields, source), stored
        )
    if "config" not in fields:
        raise ValueError(f"{source} lacks the field 'config'.")
    try:
        ours = T5GemmaConfig.from_dict(fields["config"])
    except TypeError as error:
        raise ValueError(f"{source} lacks a field: {error}.") from error
    return Checkpoint(location, kind, ours, stored, fields.get("lineage"))


def _stored_dtype(fields):
    policy = fields.get("dtype") or {}
    name = policy if isinstance(policy, str) else policy.get("config", {}).get("name")
    try:
        variable_dtype = keras.dtype_policies.get(name).variable_dtype
    except (ValueError, TypeError):
        return "quantized"
    quantized = getattr(keras.dtype_policies.get(name), "quantization_mode", None)
    if name is None or quantized or variable_dtype not in DTYPES:
        return "quantized"
    return variable_dtype

"""Changes of a backbone in place: quantization, and adapters (LoRA)."""

import gc
import os
import re
from collections.abc import Sequence
from typing import Any

import keras

from keras_t5gemma.distribution import mesh, process_group
from keras_t5gemma.modeling import lora
from keras_t5gemma.modeling.layer_iteration import (
    is_projection_or_embedding,
    iter_layers,
    path_of,
)
from keras_t5gemma.modeling.quantized_loading import QUANTIZED
from keras_t5gemma.modeling.trainability import KeepsTrainability
from keras_t5gemma.utils.checks import one_of, shown

_MODES = (*QUANTIZED, "float8", "gptq", "awq")  # Keras's.


class ChangesInPlace(KeepsTrainability):
    """Mixin of a `Backbone`: quantization and adapters."""

    config: Any
    name: str
    trainable: bool
    dtype_policy: Any

    def get_config(self) -> dict:
        """What KerasHub's `Backbone.get_config` gives; with the dtypes as they are.

        KerasHub leaves out the policy of the layers that are not quantized, and those
        that were quantized after the model had a map of policies.
        """
        config = {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": keras.dtype_policies.serialize(_policy(self)),
        }
        return self._with_frozen_layers(config)

    def quantize(
        self, mode: str | None = None, filters: Any = None, **kwargs: Any
    ) -> None:
        """Quantize projections and embeddings in place; see `keras.Model.quantize`.

        Args:
            mode: `"int8"`, `"int4"`, or another mode of Keras; `None` with a `config`.
            filters: which layers, as in Keras: a regular expression of names without
                the path (`"query"`, `"gate"`, `"token_embedding"`, ...), a list of
                them, or a function of a layer; `None` is all projections and
                embeddings.
            **kwargs: those of `keras.Model.quantize`, e.g. `config`.

        Raises:
            ValueError: for an unknown mode; for `filters` that match no layer, or one
                that is quantized already; or with several processes, none of which
                has a whole weight.
        """
        if process_group.process_count() > 1:
            raise ValueError(
                "`quantize` needs whole weights, but each process has a part of them: "
                "quantize and `save_to_preset` in one process, and load that preset in "
                "all processes."
            )
        if mode is not None:
            one_of(mode, "mode", _MODES)
        mesh.prepare(self.config)
        if filters is None:
            filters = is_projection_or_embedding
        self._check_matches(filters)
        self._check_float(filters)
        gc.freeze()  # Keras collects garbage after every layer, 0.4 s each time.
        try:
            super().quantize(mode, filters=filters, **kwargs)  # type: ignore[misc]
        finally:
            gc.unfreeze()

    def _check_matches(self, filters):
        """Raise `ValueError` for regular expressions that match no layer."""
        if callable(filters):
            return
        patterns = [filters] if isinstance(filters, str) else filters
        if not isinstance(patterns, list | tuple):
            raise ValueError(
                "`filters` must be a regular expression, a list of them, or a function "
                f"of a layer; got {shown(filters)}."
            )
        layers = filter(is_projection_or_embedding, iter_layers(self))  # type: ignore
        names = sorted({layer.name for layer in layers})
        try:
            found = [name for p in patterns for name in names if re.search(p, name)]
        except (re.error, TypeError) as error:
            raise ValueError(
                f"`filters` must be regular expressions; got {filters!r}: {error}."
            ) from error
        if not found:
            raise ValueError(
                f"`filters` must match the name of a layer, one of {', '.join(names)}; "
                f"got {filters!r}. Paths are not searched: for a part of the model "
                "pass a function, e.g. `lambda layer: 'encoder' in layer.path`."
            )

    def _check_float(self, filters):
        """Raise `ValueError` for layers that are quantized: Keras does so midway."""
        layers = [x for x in iter_layers(self) if is_projection_or_embedding(x)]  # type: ignore
        if callable(filters):
            chosen = [layer for layer in layers if filters(layer)]
        else:
            patterns = [filters] if isinstance(filters, str) else filters
            chosen = [x for x in layers if any(re.search(p, x.name) for p in patterns)]
        done = [x for x in chosen if getattr(x, "quantization_mode", None)]
        if done:
            raise ValueError(
                f"`quantize` changes float layers, but {path_of(done[0])!r} is "
                f"{done[0].quantization_mode} already, like {len(done)} of the "
                f"{len(chosen)} chosen layers. Load the float preset again, or choose "
                "other layers with `filters`."
            )

    def enable_lora(
        self,
        rank: int,
        target_layer_names: Sequence[str] | None = None,
        parts: Sequence[str] | None = None,
    ) -> None:
        """Freeze the model and add low-rank adapters to it (arXiv 2106.09685).

        Args:
            rank: inner size of the adapters, at least 1.
            target_layer_names: names of the layers; see `Seq2SeqLM.enable_lora`.
            parts: parts of the model; see `Seq2SeqLM.enable_lora`.

        Raises:
            ValueError: for a rank below 1, or names that match no layer.
        """
        mesh.prepare(self.config)
        lora.enable(self, rank, target_layer_names, parts)

    def save_lora_weights(self, filepath: str | os.PathLike[str]) -> None:
        """Save the adapters alone.

        Args:
            filepath: path in `.lora.h5`; or of a folder for the `peft` library.

        Raises:
            ValueError: without adapters, for another suffix, or adapters that PEFT does
                not have.
        """
        lora.save(self, filepath)

    def load_lora_weights(self, filepath: str | os.PathLike[str]) -> None:
        """Load adapters into the layers that they were saved from.

        Args:
            filepath: what `save_lora_weights` wrote, or a folder of the `peft` library.

        Raises:
            ValueError: for adapters that do not fit the model.
        """
        mesh.prepare(self.config)
        lora.load(self, filepath)

    def default_lora_layer_names(self) -> list[str]:
        """Layers that `enable_lora` adapts when it is not told which.

        Returns:
            Names of the query and value projections, of self- and cross-attention.
        """
        return ["query", "value"]


def _policy(model):
    """The dtype policy of a model, a map of them if layers are quantized."""
    policy = model.dtype_policy
    layers = [x for x in iter_layers(model) if x.quantization_mode is not None]
    if not layers:
        return policy
    policies = {}
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        policy, policies = policy.default_policy, dict(policy)
    policies |= {path_of(layer): layer.dtype_policy for layer in layers}
    return keras.dtype_policies.DTypePolicyMap(policy.name, policies)

"""Distillation teacher in memory: a causal LM that reads the texts of each batch."""

import os
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_t5gemma.checkpoints import hub, presets
from keras_t5gemma.distribution import mesh
from keras_t5gemma.environment import require_keras_hub
from keras_t5gemma.tokenization.tokenizer import Tokenizer
from keras_t5gemma.utils.backends import no_gradients
from keras_t5gemma.utils.buckets import round_up
from keras_t5gemma.utils.files import read_bytes
from keras_t5gemma.utils.ragged import Ragged
from keras_t5gemma.utils.types import Tensor


class TeacherInMemory:
    """A KerasHub causal LM that reads the texts of every batch.

    Args:
        model: the `keras_hub.models.CausalLM`.
        proto: bytes of its SentencePiece model, when the model has no preprocessor.

    Raises:
        ValueError: for another model, or one whose logits are not a product with an
            embedding table.
    """

    top_k = None  # It gives the whole distribution.

    def __init__(self, model: keras.Model, proto: bytes | None = None) -> None:
        keras_hub = require_keras_hub("A teacher in memory")
        is_causal = isinstance(model, keras_hub.models.CausalLM)
        if not is_causal or isinstance(model, keras_hub.models.Seq2SeqLM):
            raise ValueError(
                "`teacher` must be a keras_hub.models.CausalLM that is decoder-only; "
                f"got {type(model).__name__}."
            )
        embedding = getattr(model.backbone, "token_embedding", None)
        if not isinstance(embedding, keras.layers.ReversibleEmbedding) or (
            embedding.quantization_mode or embedding.lora_enabled
        ):
            raise ValueError(
                "`teacher` must compute its logits with `backbone.token_embedding`, a "
                "ReversibleEmbedding that is neither quantized nor has adapters; "
                f"{model.name} does not."
            )
        self.model = model
        self.embedding = embedding
        tokenizer = getattr(getattr(model, "preprocessor", None), "tokenizer", None)
        self.proto = proto or getattr(tokenizer, "proto", None)

    @classmethod
    def from_preset(cls, preset: str) -> "TeacherInMemory":
        """Load a KerasHub preset; needs no TensorFlow.

        Args:
            preset: name, folder or handle of a causal LM.

        Raises:
            ImportError: without KerasHub.
            ValueError: for another preset.
        """
        keras_hub = require_keras_hub("A teacher in memory")
        names = keras_hub.models.CausalLM.presets
        is_folder = preset not in names and os.path.isdir(preset)
        if not (preset in names or "://" in preset or is_folder):
            raise ValueError(
                "`preset` must be a name, folder or handle of a KerasHub causal LM, "
                f"e.g. 'gemma2_2b_en'; got {preset!r}."
            )
        if is_folder and not os.path.exists(f"{preset}/config.json"):
            raise ValueError(f"`preset` {preset} has no config.json of KerasHub.")
        model = keras_hub.models.CausalLM.from_preset(preset, preprocessor=None)
        try:
            location = names.get(preset, {}).get("kaggle_handle", preset)
            path = hub.get_file(location, f"assets/tokenizer/{presets.VOCABULARY_FILE}")
        except Exception:  # KerasHub raises what the hub's library does.
            return cls(model)
        return cls(model, read_bytes(path))

    @property
    def variables(self) -> list:
        """All variables of the model; none is trained."""
        return self.model.backbone.variables

    def read(
        self, token_ids: Tensor, padding_mask: Tensor
    ) -> tuple[Tensor, Tensor, float | None]:
        """States `(rows, length, E)`, logit table `(V, E)` and soft cap."""
        with no_gradients():
            states = self.model.backbone(
                {"token_ids": token_ids, "padding_mask": padding_mask}, training=False
            )
            if self.embedding.tie_weights:
                table = ops.convert_to_tensor(self.embedding.embeddings)
            else:
                table = ops.transpose(self.embedding.reverse_embeddings)
            table = ops.cast(table, states.dtype)
        states, table = ops.stop_gradient(states), ops.stop_gradient(table)
        return states, table, self.embedding.logit_soft_cap

    def check(self, batches: Any) -> None:
        """Raise `ValueError` when the vocabulary of a dataset is another one."""
        self.check_vocabulary(batches.preprocessor.tokenizer)

    def check_vocabulary(self, tokenizer: Tokenizer) -> None:
        """Raise `ValueError` when the vocabulary of a tokenizer is another one."""
        size, own = self.embedding.input_dim, tokenizer.vocabulary_size()
        differs = size < own
        if not differs and self.proto not in (None, tokenizer.proto):
            vocabulary = Tokenizer(self.proto).get_vocabulary()
            differs = vocabulary != tokenizer.get_vocabulary()
        if differs:
            raise ValueError(
                f"`teacher` must have the vocabulary of the student, {own} pieces; "
                f"{self.model.name} has another one, of {size}."
            )

    def inputs(
        self,
        batches: Any,
        pairs: np.ndarray,
        places: Ragged,
        mask: np.ndarray,
        width: int,
    ) -> dict[str, np.ndarray]:
        """The teacher's inputs for a batch, and the position of each label's state.

        Args:
            batches: a `DocumentDataset`.
            pairs: numbers of the pieces in the batch, in their order.
            places: their `objective_pairs.places`.
            mask: the decoder's padding mask, `(rows, length)`.
            width: maximum number of tokens in a piece of this batch.

        Returns:
            `teacher_token_ids` and `teacher_padding_mask`, int32 `(texts, width + 1)`,
            and `teacher_places`, int32 `(rows, length)`: flat positions in the token
            ids of all processes, or -1.
        """
        pieces = batches.pieces.take(pairs)
        before, texts = mesh.rows_for(batches.max_pieces(len(mask)))
        shape = (texts, round_up(width + 1, 8))
        ids, read = np.zeros(shape, "int32"), np.zeros(shape, "int32")
        ids[: len(pieces), 0] = batches.preprocessor.tokenizer.start_token_id
        row = pieces.row_numbers()
        column = np.arange(len(row)) - pieces.starts[row] + 1
        ids[row, column] = pieces.values
        read[: len(pieces), 0] = read[row, column] = 1
        start = (before + places.row_numbers()) * shape[1]
        flat = np.where(places.values < 0, -1, start + places.values)
        return {
            "teacher_token_ids": ids,
            "teacher_padding_mask": read,
            "teacher_places": spread(flat.astype("int32"), mask, -1),
        }


def spread(values: np.ndarray, mask: np.ndarray, fill: float) -> np.ndarray:
    """Scatter one value per token into an array of rows, `(rows, length, ...)`.

    Args:
        values: `(tokens, ...)`, row after row.
        mask: `(rows, length)`, above 0 at tokens.
        fill: the value of padding.
    """
    out = np.full((*mask.shape, *values.shape[1:]), fill, values.dtype)
    out[mask > 0] = values
    return out

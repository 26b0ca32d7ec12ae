"""Precomputed top-k teacher log-probabilities."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_t5gemma.checkpoints import saved_files
from keras_t5gemma.checkpoints.atomic import atomic_folder
from keras_t5gemma.data.document_dataset import read_pieces
from keras_t5gemma.data.text_columns import as_documents
from keras_t5gemma.training.chunked_cross_entropy import top_choices
from keras_t5gemma.training.teacher_in_memory import TeacherInMemory, spread
from keras_t5gemma.utils.buckets import round_up
from keras_t5gemma.utils.checks import json_object, path, whole_number
from keras_t5gemma.utils.files import (
    check_regular,
    named_values,
    read_json_file,
    sha256,
)
from keras_t5gemma.utils.progress import progress_bar
from keras_t5gemma.utils.ragged import Ragged

IDS, LOG_PROBS, ABOUT = "ids.npy", "log_probs.npy", "teacher.json"


class TeacherScores:
    """Precomputed top-k log-probabilities of a teacher, for every token of some texts.

    They are independent of the objective: every target of every epoch has its rows, as
    long as the texts are cut at the same lengths. Written by `write_teacher_scores`;
    memory-mapped and read row by row.

    Args:
        folder: path.
        check: verify the checksums of the files, which reads them once.

    Attributes:
        top_k: number of tokens per position.

    Raises:
        ValueError: when the folder has no scores, or files with other checksums.
    """

    def __init__(self, folder: str | os.PathLike, check: bool = True) -> None:
        self.folder = path(folder, "folder")
        try:
            about = read_json_file(self.folder / ABOUT)
            self.ids = _map(self.folder / IDS)
            self.log_probs = _map(self.folder / LOG_PROBS)
            with named_values(self.folder / ABOUT):
                digests = json_object(about["sha256"], "sha256")
                self.texts = about["texts"]
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"`folder` {folder} has no teacher scores: {error}. Write them with "
                "`keras_t5gemma.write_teacher_scores`."
            ) from error
        for name, digest in digests.items() if check else ():
            if digest != sha256(self.folder / name):
                raise ValueError(
                    f"{self.folder / name} has changed: its checksum differs. Write "
                    "the scores again."
                )
        self.top_k = self.ids.shape[1]

    def check(self, batches: Any) -> None:
        """Check that these are the scores of the texts of a dataset.

        Args:
            batches: the `DocumentDataset` of `fit`.

        Raises:
            ValueError: when they are of other texts, or of texts cut elsewhere.
        """
        if fingerprint(batches.pieces) != self.texts:
            raise ValueError(
                f"The scores in {self.folder} are of other texts, or of texts cut at "
                "other lengths. `fit` needs the preprocessor and the texts they were "
                "written with, in the same order."
            )

    def inputs(
        self,
        batches: Any,
        pairs: np.ndarray,
        places: Ragged,
        mask: np.ndarray,
        width: int,
    ) -> dict[str, np.ndarray]:
        """Scores of a batch.

        Args:
            batches: a `DocumentDataset`.
            pairs: numbers of the pieces in the batch, in their order.
            places: their `objective_pairs.places`.
            mask: the decoder's padding mask, `(rows, length)`.
            width: maximum number of tokens in a piece of this batch; not used.

        Returns:
            `teacher_ids`, int32, and `teacher_log_probs`, float32, `(rows, length, K)`;
            and `teacher_places`, int32 `(rows, length)`, -1 at tokens without scores.
        """
        first = (batches.pieces.starts[pairs] + pairs)[places.row_numbers()]
        rows = first + np.maximum(places.values, 0)
        return {
            "teacher_ids": spread(self.ids[rows].astype("int32"), mask, 0),
            "teacher_log_probs": spread(
                self.log_probs[rows].astype("float32"), mask, 0
            ),
            "teacher_places": spread(places.values.astype("int32"), mask, -1),
        }


def write_teacher_scores(
    folder: str | os.PathLike,
    teacher: Any,
    preprocessor: Any,
    texts: Any,
    top_k: int = 64,
    batch_size: int = 8,
    verbose: str | int = "auto",
) -> TeacherScores:
    """Precompute a teacher's top-k log-probabilities of texts, for distillation.

    They take 6 bytes per token and choice: 384 bytes per token for the top 64. The
    folder is written atomically.

    Args:
        folder: path; an earlier one is replaced.
        teacher: a `keras_hub.models.CausalLM` with the same vocabulary.
        preprocessor: the `Seq2SeqLMPreprocessor` of the training, with its objective:
            its lengths decide how texts are cut.
        texts: the training texts of `fit`: a list of strings, or a dict or
            `datasets.Dataset` with `"text"`, or a `pathlib.Path`.
        top_k: number of tokens to keep per position.
        batch_size: texts in a batch of the teacher.
        verbose: 0 silent, 1 a progress bar, "auto" is 1 on a terminal.

    Returns:
        The `TeacherScores`.

    Raises:
        ValueError: for a teacher with another vocabulary, texts that `fit` does not
            accept, or a folder with other files of these names.
    """
    saved_files.refuse_foreign(Path(folder), (IDS, LOG_PROBS, ABOUT))
    if preprocessor.objective is None:
        raise ValueError("`preprocessor` must have an `objective`; it has none.")
    if not isinstance(teacher, TeacherInMemory):
        teacher = TeacherInMemory(teacher)
    size = teacher.embedding.input_dim
    top_k = whole_number(top_k, "top_k", 1, size)
    columns = as_documents(texts)
    if columns is None:
        raise ValueError(
            f"`texts` must be texts in memory, or a file; got {type(texts).__name__}."
        )
    pieces, _ = read_pieces(preprocessor, columns, "texts")
    teacher.check_vocabulary(preprocessor.tokenizer)
    choose = _Chooser(teacher, top_k)
    start = preprocessor.tokenizer.start_token_id
    shape = (len(pieces.values) + len(pieces), top_k)
    with atomic_folder(folder) as staging:
        new = np.lib.format.open_memmap
        ids = new(staging / IDS, "w+", "uint32", shape)
        log_probs = new(staging / LOG_PROBS, "w+", "float16", shape)
        order = np.argsort(-pieces.lengths, kind="stable")
        with progress_bar("Teacher", len(order), verbose=verbose != 0) as advance:
            for first in range(0, len(order), batch_size):
                numbers = order[first : first + batch_size]
                _write(pieces, numbers, batch_size, start, choose, ids, log_probs)
                advance(len(numbers))
        ids.flush()
        log_probs.flush()
        about = {
            "teacher": teacher.model.name,
            "texts": fingerprint(pieces),
            "sha256": {name: sha256(staging / name) for name in (IDS, LOG_PROBS)},
        }
        (staging / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
    return TeacherScores(folder, check=False)


class _Chooser(keras.Model):
    """A teacher's most likely next tokens, as a Keras model that `predict` compiles."""

    def __init__(self, teacher, top_k):
        super().__init__(name="chooser")
        self.teacher, self.top_k = teacher, top_k
        self.backbone = teacher.model.backbone  # For Keras to know its variables.

    def call(self, inputs):
        states, table, cap = self.teacher.read(**inputs)
        shape = keras.ops.shape(states)
        states = keras.ops.reshape(states, (-1, states.shape[-1]))
        found = top_choices(states, table, cap, self.top_k)
        return [keras.ops.reshape(x, (*shape[:2], self.top_k)) for x in found]


def _write(pieces, numbers, batch_size, start, choose, ids, log_probs):
    """Write the scores of some pieces, computed in a batch of fixed size."""
    lengths = pieces.lengths[numbers]
    width = round_up(lengths.max() + 1, 64)
    token_ids = np.zeros((batch_size, width), "int32")
    mask = np.zeros((batch_size, width), "int32")
    for row, number in enumerate(numbers):
        token_ids[row, 0] = start
        token_ids[row, 1 : lengths[row] + 1] = pieces[number]
        mask[row, : lengths[row] + 1] = 1
    found = choose.predict_on_batch({"token_ids": token_ids, "padding_mask": mask})
    for row, number in enumerate(numbers):
        here = pieces.starts[number] + number
        here = slice(here, here + lengths[row] + 1)
        ids[here], log_probs[here] = (x[row, : lengths[row] + 1] for x in found)


def fingerprint(pieces: Ragged) -> str:
    """SHA-256 of texts as token ids and of the lengths at which they are cut."""
    digest = hashlib.sha256(np.asarray(pieces.lengths, "int64").tobytes())
    digest.update(np.asarray(pieces.values, "int32").tobytes())
    return digest.hexdigest()


def _map(path):
    """A memory-mapped array."""
    check_regular(path)
    return np.load(path, mmap_mode="r")

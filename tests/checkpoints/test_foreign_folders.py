"""Folders of transformers' other T5Gemma classes, subfolders, and single files."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from helpers.hugging_face import STACK, randomize
from helpers.models import numpy, random_inputs

import keras_t5gemma as kt
from keras_t5gemma import config as config_module
from keras_t5gemma.checkpoints import (
    hub,
    huggingface_names,
    lazy_tensors,
    safetensors_file,
)

pytestmark = pytest.mark.one_backend
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
st = pytest.importorskip("safetensors.torch")

X = random_inputs(2, 6, 5)
X["encoder_padding_mask"][1, 4:] = X["encoder_token_ids"][1, 4:] = 0
TORCH = {k: torch.tensor(v).long() for k, v in X.items()}
ENCODER = {
    "input_ids": TORCH["encoder_token_ids"],
    "attention_mask": TORCH["encoder_padding_mask"],
}


def make(name, folder, alone=False, **fields):
    """A random model of a class of transformers, saved into a folder."""
    decoder = {**STACK, "hidden_size": 24, "num_hidden_layers": 3}
    config = transformers.T5GemmaConfig(
        encoder=dict(STACK), decoder=decoder, vocab_size=480, **fields
    )
    config.is_encoder_decoder = not alone
    config._attn_implementation = "eager"
    model = getattr(transformers, name)(config).eval()
    randomize(model.parameters())
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A `T5GemmaForConditionalGeneration`, its folder, states and logits."""
    folder = tmp_path_factory.mktemp("whole")
    model = make("T5GemmaForConditionalGeneration", folder)
    inputs = {f"decoder_{k}": TORCH[f"decoder_{v}"] for k, v in PARTS.items()}
    with torch.no_grad():
        out = model(**ENCODER, **inputs)
    return folder, out.encoder_last_hidden_state.numpy(), out.logits.numpy()


PARTS = {"input_ids": "token_ids", "attention_mask": "padding_mask"}
SEEN = X["encoder_padding_mask"].astype(bool)


def check_states(backbone, expected):
    ids = X["encoder_token_ids"], X["encoder_padding_mask"]
    assert np.abs((numpy(backbone.encode(*ids)) - expected)[SEEN]).max() <= 1e-5


def check_logits(backbone, expected):
    logits = numpy(backbone.logits(backbone(X)["decoder_sequence_output"]))
    assert np.abs(logits - expected).max() <= 1e-5


def rewrite(folder, target, names, **fields):
    """A copy of a folder with tensors renamed; `names` gives `None` to leave out."""
    shutil.copytree(folder, target)
    path = target / "model.safetensors"
    tensors = {names(n): t.clone() for n, t in st.load_file(path).items()}
    tensors.pop(None, None)
    st.save_file(tensors, path)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **fields}))
    return target


def test_an_encoder_model(tmp_path):
    model = make("T5GemmaEncoderModel", tmp_path, alone=True)
    with torch.no_grad():
        expected = model(**ENCODER).last_hidden_state.numpy()
    check_states(kt.Backbone.from_preset(tmp_path), expected)


def test_an_encoder_module_with_a_flat_config(whole, tmp_path):
    folder, states, _ = whole
    start = "model.encoder."

    def names(name):
        return name.removeprefix(start) if name.startswith(start) else None

    flat = rewrite(folder, tmp_path / "flat", names)
    config = json.loads((flat / "config.json").read_text())["encoder"]
    config |= {"model_type": "t5_gemma_module", "architectures": ["T5GemmaEncoder"]}
    (flat / "config.json").write_text(json.dumps(config))
    backbone = kt.Backbone.from_preset(flat)
    assert backbone.decoder is None
    check_states(backbone, states)
    (flat / "config.json").write_text(json.dumps({**config, "is_decoder": True}))
    with pytest.raises(ValueError, match="model_type 't5_gemma_module'"):
        kt.Backbone.from_preset(flat)


def test_a_model_without_logits(tmp_path):
    make("T5GemmaModel", tmp_path)
    names = st.load_file(tmp_path / "model.safetensors")
    assert not any(name.startswith("model.") for name in names)
    backbone = kt.Backbone.from_preset(tmp_path)
    assert (
        numpy(backbone.decoder.final_norm.scale) == names["decoder.norm.weight"].numpy()
    ).all()


@pytest.mark.parametrize("prefix", ["text_encoder.", "module.", "a.model."])
def test_prefixes_of_other_programs(whole, tmp_path, prefix):
    folder, states, logits = whole
    copy = rewrite(folder, tmp_path / "x", lambda name: prefix + name)
    check_logits(kt.Backbone.from_preset(copy), logits)
    check_states(kt.Backbone.from_preset(copy, encoder_only=True), states)


def test_the_logit_table_alone_and_a_copy_that_differs(whole, tmp_path):
    folder, _, logits = whole
    head, table = "lm_head.out_proj.weight", "model.decoder.embed_tokens.weight"
    renamed = rewrite(folder, tmp_path / "a", lambda n: head if n == table else n)
    check_logits(kt.Backbone.from_preset(renamed), logits)
    untied = rewrite(renamed, tmp_path / "b", str, tie_word_embeddings=False)
    with pytest.warns(UserWarning, match="separate logit table.*only 'lm_head"):
        check_logits(kt.Backbone.from_preset(untied), logits)
    path = untied / "model.safetensors"
    tensors = st.load_file(path)
    st.save_file({**tensors, table: tensors[head].clone()}, path)
    check_logits(kt.Backbone.from_preset(untied), logits)  # They are equal.
    st.save_file({**tensors, table: tensors[head] + 1}, path)
    with pytest.raises(ValueError, match="'lm_head.out_proj.weight' differs from"):
        kt.Backbone.from_preset(untied)


def test_two_sets_of_weights(whole, tmp_path):
    copy = rewrite(whole[0], tmp_path / "x", str)
    path = copy / "model.safetensors"
    tensors = st.load_file(path)
    tensors["encoder.norm.weight"] = tensors["model.encoder.norm.weight"].clone()
    st.save_file(tensors, path)
    check_states(kt.Backbone.from_preset(copy), whole[1])
    st.save_file({**tensors, "encoder.norm.weight": torch.ones(16)}, path)
    with pytest.raises(ValueError, match="two sets of weights that differ.*'encoder.n"):
        kt.Backbone.from_preset(copy)
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="two sets of weights, model.safetensors and"):
        kt.Backbone.from_preset(copy)


LABELS = {0: "bad", 1: "good", 2: "neither"}


def test_a_model_for_sequence_classification(tmp_path, proto):
    name = "T5GemmaForSequenceClassification"
    model = make(name, tmp_path, alone=True, id2label=LABELS)
    (tmp_path / "tokenizer.model").write_bytes(proto)
    classifier = kt.TextClassifier.from_preset(tmp_path)
    assert classifier.class_names == ["bad", "good", "neither"]
    with torch.no_grad():
        expected = model(**ENCODER).logits.numpy()
        states = model.model(**ENCODER).last_hidden_state.numpy()
    x = {k: v for k, v in X.items() if k.startswith("encoder")}
    assert np.abs(numpy(classifier(x)) - expected).max() <= 1e-5
    assert classifier.classify(["A board"])[0] in LABELS.values()
    with pytest.warns(UserWarning, match="score.out_proj.weight, which is not part"):
        check_states(kt.Backbone.from_preset(tmp_path), states)
    with pytest.warns(UserWarning, match="score.out_proj.weight"):
        other = kt.TextClassifier.from_preset(tmp_path, num_classes=5)
    assert other.num_classes == 5
    path = tmp_path / "model.safetensors"
    tensors = st.load_file(path)
    st.save_file({**tensors, "score.out_proj.weight": torch.ones(3, 24)}, path)
    with pytest.raises(ValueError, match=r"3 classes for width 16.*\(3, 24\)"):
        kt.TextClassifier.from_preset(tmp_path)


def test_a_model_for_token_classification(tmp_path):
    name = "T5GemmaForTokenClassification"
    model = make(name, tmp_path, alone=True, id2label=LABELS)
    with torch.no_grad():
        states = model.model(**ENCODER).last_hidden_state.numpy()
    with pytest.warns(UserWarning, match="score.*not loaded"):
        check_states(kt.Backbone.from_preset(tmp_path), states)


def test_a_checkpoint_of_a_trainer(whole, tmp_path):
    copy = rewrite(whole[0], tmp_path / "checkpoint-500", str)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (copy / name).write_bytes(b"PK")
    (copy / "trainer_state.json").write_text("{}")
    check_logits(kt.Backbone.from_preset(copy), whole[2])


def test_one_file_without_a_config(whole, tmp_path, monkeypatch):
    folder, states, logits = whole
    tiny = kt.Backbone.from_preset(folder).config
    encoder = rewrite(
        folder, tmp_path / "e", lambda n: n if n.startswith("model.encoder") else None
    )
    pair, alone = folder / "model.safetensors", encoder / "model.safetensors"
    with pytest.raises(ValueError, match="2 layers of width 16.*no released size"):
        kt.Backbone.from_preset(alone)
    check_logits(kt.Backbone.from_preset(pair, config=tiny), logits)
    monkeypatch.setitem(config_module.STACKS, "t", tiny.encoder)
    monkeypatch.setitem(config_module.STACKS, "u", tiny.decoder)
    check_logits(kt.Backbone.from_preset(pair), logits)
    check_states(kt.Backbone.from_preset(pair, encoder_only=True), states)
    for kwargs in ({}, {"config": "t"}):
        backbone = kt.Backbone.from_preset(alone, **kwargs)
        assert backbone.decoder is None
        check_states(backbone, states)
    embedder = kt.TextEmbedder.from_preset(alone, preprocessor=None)
    check_states(embedder.backbone, states)
    with pytest.raises(ValueError, match="`config` must be one of s, b.*'7b'"):
        kt.Backbone.from_preset(alone, config="7b")
    with pytest.raises(ValueError, match="`config` is for one .safetensors file"):
        kt.Backbone.from_preset(folder, config="t")


def test_one_file_whose_shapes_are_not_those_of_the_config(whole, monkeypatch):
    path = whole[0] / "model.safetensors"
    tiny = kt.Backbone.from_preset(whole[0]).config
    narrow = dataclasses.replace(tiny.encoder, intermediate_dim=20)
    monkeypatch.setitem(config_module.STACKS, "n", narrow)
    wrong = dataclasses.replace(tiny, encoder=narrow)
    for config in (wrong, "n", "n-n"):
        with pytest.raises(
            ValueError, match=r"gate_proj.weight.*config needs \(20, 16\)"
        ):
            kt.Backbone.from_preset(path, config=config)
    shallow = dataclasses.replace(tiny.encoder, num_layers=1, layer_types=None)
    with pytest.raises(ValueError, match=r"model.safetensors.*layers\.1"):
        kt.Backbone.from_preset(path, config=dataclasses.replace(tiny, encoder=shallow))
    smaller = dataclasses.replace(tiny, vocabulary_size=470)
    with pytest.raises(ValueError, match=r"model.safetensors.*470"):
        kt.Backbone.from_preset(path, config=smaller)
    for wrong in (5, "9b-", "a-b-c", ["2b"]):
        with pytest.raises(ValueError, match="`config` must be one of"):
            kt.Backbone.from_preset(path, config=wrong)


def kinds_of_folders(folder, root):
    """The states of `folder` in every kind of folder or file, by its kind."""

    def encoder(name):
        return name if "encoder" in name else None

    found = {"pair": folder}
    found["encoder"] = rewrite(folder, root / "encoder", encoder)
    config = json.loads((folder / "config.json").read_text())
    fields = config["encoder"] | {"model_type": "t5_gemma_module"}
    found["flat"] = rewrite(
        found["encoder"], root / "flat", lambda n: n.removeprefix("model.encoder.")
    )
    (found["flat"] / "config.json").write_text(json.dumps(fields))
    found["prefix"] = rewrite(folder, root / "prefix", lambda n: f"text_encoder.{n}")
    found["plain"] = rewrite(folder, root / "plain", lambda n: n.removeprefix("model."))
    found["head"] = rewrite(folder, root / "head", str)
    path = found["head"] / "model.safetensors"
    st.save_file({**st.load_file(path), "score.weight": torch.ones(3, 16)}, path)
    found["logits"] = rewrite(
        folder,
        root / "logits",
        lambda n: "lm_head.out_proj.weight" if n.startswith("model.decoder.e") else n,
    )
    found["file"] = found["pair"] / "model.safetensors"
    return found


@pytest.mark.filterwarnings("ignore:.*has a head:UserWarning")
def test_an_encoder_alone_reads_its_tensors_and_no_other_byte(
    whole, tmp_path, monkeypatch
):
    folder, states, _ = whole
    tiny = kt.Backbone.from_preset(folder).config
    read = set()
    read_into = lazy_tensors.read_into

    def noted(file, view, name):
        read.update(range(file.tell(), file.tell() + len(view)))
        read_into(file, view, name)

    monkeypatch.setattr(lazy_tensors, "read_into", noted)
    for kind, path in kinds_of_folders(folder, tmp_path).items():
        read.clear()
        kwargs = {"config": tiny} if kind == "file" else {}
        backbone = kt.Backbone.from_preset(path, encoder_only=True, **kwargs)
        file = path if path.is_file() else path / "model.safetensors"
        own = {
            byte
            for name, entry in safetensors_file.read_header(file).items()
            if not re.search("decoder|score|lm_head", name)
            for byte in range(entry.offset, entry.offset + entry.nbytes)
        }
        assert read == own, kind
        assert len(own) == 4 * backbone.count_params()
        check_states(backbone, states)


def test_a_subfolder(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "text_encoder")
    check_logits(kt.Backbone.from_preset(tmp_path, subfolder="text_encoder"), whole[2])
    for wrong in ("../x", "/etc", "a/../../b", ""):
        with pytest.raises(ValueError, match="`subfolder` must"):
            kt.Backbone.from_preset(tmp_path, subfolder=wrong)
    with pytest.raises(ValueError, match="`revision` must be.*hf://"):
        kt.Backbone.from_preset(tmp_path, revision="main")


def test_a_subfolder_and_a_revision_of_a_repository(whole, monkeypatch):
    import huggingface_hub

    asked = []

    def file(repository, filename, local_files_only, revision=None):
        asked.append((repository, filename, revision))
        return str(whole[0] / filename.removeprefix("sub/folder/"))

    def snapshot(repository, allow_patterns, local_files_only, revision=None):
        assert "sub/folder/*.safetensors" in allow_patterns
        asked.append((repository, "", revision))
        return str(whole[0].parent / "hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", file)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    shutil.copytree(whole[0], whole[0].parent / "hub/sub/folder", dirs_exist_ok=True)
    for preset, kwargs in (
        ("hf://me/mine/sub/folder", {}),
        ("hf://me/mine", {"subfolder": "sub/folder", "revision": "v2"}),
        ("hf://me/mine@v2/sub/folder", {}),
    ):
        asked.clear()
        check_logits(kt.Backbone.from_preset(preset, **kwargs), whole[2])
        revision = "v2" if "v2" in str((preset, kwargs)) else None
        assert {(r, v) for r, _, v in asked} == {("me/mine", revision)}
        assert ("me/mine", "sub/folder/config.json", revision) in asked
    with pytest.raises(ValueError, match="`subfolder` must stay inside"):
        kt.Backbone.from_preset("hf://me/mine/../other")
    assert hub.split_hugging_face("me/mine") == ("me/mine", "", {})


def test_names_are_not_mixed_up():
    known = {"model.encoder.layers.0.mlp.up_proj.weight"}
    names = huggingface_names.Names(known)
    assert names.find("x.layers.0.mlp.up_proj.weight") in known
    for other in ("decoder.layers.0.mlp.up_proj.weight", "layers.1.mlp.up_proj.weight"):
        assert names.find(other) == other

"""Gemma 2 to T5Gemma: the identities, the files, the refusals."""

import json
import shutil

import keras_hub
import numpy as np
import pytest
from helpers.gemma2 import BIG, SMALL, VOCABULARY, WINDOW, make_gemma2
from helpers.models import make_proto, max_difference, numpy

import keras_t5gemma as kt
from keras_t5gemma.checkpoints import atomic, safetensors_file
from keras_t5gemma.checkpoints.checkpoint import open_checkpoint
from keras_t5gemma.conversion import adapt, adaptation_checks
from keras_t5gemma.conversion.adaptation_checks import (
    causal_encoder_states,
    decoder_logits_without_cross,
)
from keras_t5gemma.conversion.compare import check_checksums


@pytest.fixture(scope="module")
def big():
    return make_gemma2(**BIG)


@pytest.fixture(scope="module")
def small():
    return make_gemma2(num_query_heads=2, num_key_value_heads=1, seed=1, **SMALL)


@pytest.fixture(scope="module")
def folders(big, small, proto, tmp_path_factory):
    """The same two as KerasHub presets with a tokenizer, as users have them."""
    root = tmp_path_factory.mktemp("gemma2")
    for name, model in (("big", big), ("small", small)):
        model.save_to_preset(str(root / name))
        assets = root / name / "assets" / "tokenizer"
        assets.mkdir(parents=True)
        (assets / "vocabulary.spm").write_bytes(proto)
    return root


def random_ids(length=14):
    return np.random.default_rng(0).integers(4, VOCABULARY, (2, length), "int32")


def assert_identities(adapted, encoder_source, decoder_source):
    """Past the window on purpose: it must be the official one on both sides."""
    ids = random_ids()
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    states = causal_encoder_states(adapted, ids)
    assert max_difference(states, encoder_source(x)) < 1e-5
    logits = decoder_source.token_embedding(decoder_source(x), reverse=True)
    assert max_difference(decoder_logits_without_cross(adapted, ids), logits) < 3e-5
    assert np.abs(numpy(logits)).max() > 5


def test_balanced_identities_from_kerashub(big):
    adapted = kt.adapt_gemma2(big)
    assert_identities(adapted, big, big)
    for block in adapted.decoder.blocks:
        for name in ("query", "key", "value", "output_projection"):
            cross, own = (
                getattr(attention, name).kernel
                for attention in (block.cross_attention, block.self_attention)
            )
            assert max_difference(cross, own) == 0
        assert (
            max_difference(block.pre_cross_norm.scale, block.pre_self_norm.scale) == 0
        )
        assert (
            max_difference(block.post_cross_norm.scale, block.post_self_norm.scale) == 0
        )
    assert adapted.lineage["balanced"] and not adapted.lineage["needs_warm_up"]


def test_unbalanced_identities_with_other_widths_depths_and_heads(big, small):
    adapted = kt.adapt_gemma2(big, small, seed=3)
    assert_identities(adapted, big, small)
    assert adapted.lineage["needs_warm_up"]
    assert adapted.lineage["cross_attention"] == "random"
    kernels = [
        numpy(getattr(block.cross_attention, name).kernel)
        for block in adapted.decoder.blocks
        for name in ("query", "key", "value", "output_projection")
    ]
    assert 0.018 < np.concatenate([k.ravel() for k in kernels]).std() < 0.022
    assert len({k.ravel()[0] for k in kernels}) == len(kernels)
    assert (numpy(adapted.decoder.blocks[0].post_cross_norm.scale) == 0).all()
    again = kt.adapt_gemma2(big, small, seed=3)
    for a, b in zip(adapted.weights, again.weights, strict=True):
        assert max_difference(a, b) == 0


def make_hugging_face(folder, stack, seed=0):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    model = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=VOCABULARY,
            hidden_size=stack["hidden_dim"],
            intermediate_size=stack["intermediate_dim"] // 2,
            num_hidden_layers=stack["num_layers"],
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=WINDOW,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 0.3 if name.endswith("norm.weight") else 0.25
            parameter.normal_(0, std)
    model.save_pretrained(folder)
    return model.eval()


def test_identities_from_hugging_face(tmp_path):
    torch = pytest.importorskip("torch")
    models = [
        make_hugging_face(tmp_path / name, stack, seed)
        for seed, (name, stack) in enumerate((("a", BIG), ("b", SMALL)))
    ]
    adapted = kt.adapt_gemma2(tmp_path / "a", tmp_path / "b")
    ids = torch.tensor(random_ids()).long()
    with torch.no_grad():
        states = models[0].model(ids).last_hidden_state.numpy()
        logits = models[1](ids).logits.numpy()
    assert max_difference(causal_encoder_states(adapted, random_ids()), states) < 1e-5
    ours = decoder_logits_without_cross(adapted, random_ids())
    assert max_difference(ours, logits) < 3e-5


def test_a_live_model_with_lora_is_adapted_merged(small):
    tuned = make_gemma2(num_query_heads=2, num_key_value_heads=1, seed=1, **SMALL)
    tuned.enable_lora(2)
    for variable in tuned.trainable_variables:
        variable.assign(np.full(variable.shape, 0.1, "float32"))
    adapted = kt.adapt_gemma2(tuned)
    assert_identities(adapted, tuned, tuned)
    kernel = adapted.encoder.blocks[0].self_attention.query.kernel
    plain = kt.adapt_gemma2(small).encoder.blocks[0].self_attention.query.kernel
    assert max_difference(kernel, plain) > 0.01


@pytest.mark.one_backend
def test_choices_are_arguments(big, small):
    copied = kt.adapt_gemma2(big, cross_norms="zeros")
    assert (numpy(copied.decoder.blocks[0].pre_cross_norm.scale) == 0).all()
    fresh = kt.adapt_gemma2(big, cross_attention="random", cross_norms="copy")
    assert fresh.lineage["balanced"] and fresh.lineage["needs_warm_up"]
    block = fresh.decoder.blocks[0]
    assert max_difference(block.pre_cross_norm.scale, block.pre_self_norm.scale) == 0
    with pytest.raises(ValueError, match="equal width.*32 and 24"):
        kt.adapt_gemma2(big, small, cross_attention="copy")
    with pytest.raises(ValueError, match="`cross_norms` must be one of"):
        kt.adapt_gemma2(big, cross_norms="none")
    with pytest.raises(ValueError, match="`seed`.*-1"):
        kt.adapt_gemma2(big, seed=-1)
    with pytest.raises(ValueError, match="`initializer_std` must be a number above 0"):
        kt.adapt_gemma2(big, initializer_std=0)


@pytest.mark.one_backend
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_file_to_file_equals_in_memory(folders, tmp_path, dtype):
    out = tmp_path / "out"
    lineage, report = adapt.adapt_to_folder(
        folders / "big",
        folders / "small",
        folder=out,
        dtype=dtype,
        max_shard_size="60KB",
    )
    assert len(list(out.glob("model_*.weights.h5"))) > 2
    assert lineage["encoder"] == "big"
    assert len(report) == 2 and "hidden states equal big's" in report[0]
    expected = kt.adapt_gemma2(folders / "big", folders / "small", dtype=dtype)
    loaded = kt.Seq2SeqLM.from_preset(out, dtype=dtype)
    for a, b in zip(loaded.backbone.weights, expected.weights, strict=True):
        assert max_difference(a, b) == 0
    assert loaded.backbone.lineage == lineage
    assert isinstance(loaded.generate("A board", max_length=4), str)
    assert check_checksums(out) == len(loaded.backbone.weights)
    if not issubclass(kt.Backbone, keras_hub.models.Backbone):
        return  # Imported after keras_t5gemma; with KERAS_HUB_BASES it is before.
    # KerasHub's base class reads the folder by its own loader.
    theirs = keras_hub.models.Backbone.from_preset(str(out), dtype=dtype)
    for a, b in zip(theirs.weights, expected.weights, strict=True):
        assert max_difference(a, b) == 0


@pytest.mark.one_backend
def test_written_config_is_what_keras_serializes(folders, tmp_path):
    out = tmp_path / "out"
    lineage, report = adapt.adapt_to_folder(folders / "big", folder=out)
    assert "a copy of self-attention in all 4 layers" in report[0]
    config = json.loads((out / "config.json").read_text())
    assert config["config"]["lineage"] == lineage
    kt.Backbone.from_preset(out, name="backbone").save_to_preset(tmp_path / "again")
    assert config == json.loads((tmp_path / "again" / "config.json").read_text())
    assert str(tmp_path) not in (out / "config.json").read_text()


@pytest.mark.one_backend
def test_damage_is_found(folders, tmp_path):
    out = tmp_path / "out"
    adapt.adapt_to_folder(folders / "small", folder=out)
    tensors = open_checkpoint(out).tensors()
    entry = tensors["decoder/block_1/mlp/up/kernel"].source
    with open(entry.file, "r+b") as file:
        file.seek(entry.offset + 5)
        file.write(b"\x55")
    with pytest.raises(ValueError, match=r"damaged.*'decoder/block_1/mlp/up/kernel'"):
        check_checksums(out)


@pytest.mark.one_backend
def test_a_wrong_result_is_refused_before_it_appears(folders, tmp_path, monkeypatch):
    """Swap two norms behind the writer's back: the built-in check must notice."""
    original = adapt.plan_adaptation

    def swapped(*args, **kwargs):
        config, tensors, lineage, sources = original(*args, **kwargs)
        a, b = (f"encoder/block_1/{n}_norm/scale" for n in ("pre_self", "post_self"))
        tensors[a], tensors[b] = tensors[b], tensors[a]
        return config, tensors, lineage, sources

    monkeypatch.setattr(adapt, "plan_adaptation", swapped)
    with pytest.raises(ValueError, match="encoder's hidden states differ from small"):
        adapt.adapt_to_folder(folders / "small", folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_large_towers_are_checked_on_two_layers(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(adaptation_checks, "_VOCABULARY", 100)
    sources = {}
    original = adaptation_checks.check_identities

    def small_room(folder, sources_, max_bytes):
        sources.update(sources_)
        return original(folder, sources_, max_bytes=1)

    monkeypatch.setattr(adaptation_checks, "check_identities", small_room)
    _, report = adapt.adapt_to_folder(folders / "big", folder=tmp_path / "out")
    assert "on 2 of 4 layers" in report[1] and "on 2 of 4 layers" in report[2]


def test_vocabularies_must_agree(big, folders, tmp_path):
    other = make_gemma2(**{**SMALL, "vocabulary_size": 300})
    with pytest.raises(ValueError, match="one vocabulary; got 480 tokens.*and 300"):
        kt.adapt_gemma2(big, other)
    shutil.copytree(folders / "small", tmp_path / "small")
    spm = tmp_path / "small" / "assets" / "tokenizer" / "vocabulary.spm"
    spm.write_bytes(make_proto(vocab_size=470))
    with pytest.raises(ValueError, match="tokenizers differ from id [0-9]+ on"):
        kt.adapt_gemma2(folders / "big", tmp_path / "small")


def edit_config(folder, target, **changes):
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    fields = config.get("config", config)
    fields.update(changes)
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_other_models_are_refused_by_name(folders, tmp_path):
    gemma1 = edit_config(folders / "big", tmp_path / "g1", use_post_ffw_norm=False)
    with pytest.raises(ValueError, match="g1.*is Gemma 1"):
        kt.adapt_gemma2(gemma1)
    gemma3 = tmp_path / "g3"
    gemma3.mkdir()
    for model_type in ("gemma", "gemma3_text", "llama"):
        (gemma3 / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(ValueError, match=f"must be a Gemma 2.*'{model_type}'"):
            kt.adapt_gemma2(gemma3)
    (gemma3 / "config.json").write_text(
        json.dumps({"registered_name": "keras_hub>Gemma3Backbone", "config": {}})
    )
    with pytest.raises(ValueError, match="keras_hub>Gemma3Backbone"):
        kt.adapt_gemma2(gemma3)
    with pytest.raises(ValueError, match="`decoder` must be the name or folder.*int"):
        kt.adapt_gemma2(folders / "big", 3)
    with pytest.raises(ValueError, match="Did you mean gemma2_2b_en"):
        kt.adapt_gemma2("gema2_2b_en")
    with pytest.raises(ValueError, match="adapt_gemma2"):
        kt.Backbone.from_preset(folders / "big")


@pytest.mark.one_backend
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`")
def test_a_quantized_source_is_refused(tmp_path):
    source = make_gemma2(**SMALL)
    source.quantize("int8")
    with pytest.raises(ValueError, match="`encoder` is quantized"):
        kt.adapt_gemma2(source)
    source.save_to_preset(str(tmp_path / "int8"))
    with pytest.raises(ValueError, match="is quantized"):
        kt.adapt_gemma2(tmp_path / "int8")


@pytest.mark.one_backend
def test_an_output_that_exists_is_kept(folders, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="out exists already; pass `overwrite`"):
        adapt.adapt_to_folder(folders / "small", folder=out)
    adapt.adapt_to_folder(folders / "small", folder=out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    kt.Backbone.from_preset(out)
    file = out / "notes.txt"
    with pytest.raises(ValueError, match="notes.txt is a file; it must be a folder"):
        adapt.adapt_to_folder(folders / "small", folder=file, overwrite=True)
    assert file.read_text() == "mine"


def test_a_disk_without_room_is_noticed_before_writing(folders, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="out needs 0.0 GB, the disk has 0.0 GB free"):
        adapt.adapt_to_folder(folders / "small", folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_broken_sources_name_the_file_and_the_tensor(folders, tmp_path):
    make_hugging_face(tmp_path / "hf", SMALL)
    file = tmp_path / "hf" / "model.safetensors"
    entry = safetensors_file.read_header(file)["model.norm.weight"]
    assert entry.shape == (24,)
    edited = edit_config(tmp_path / "hf", tmp_path / "wide", intermediate_size=44)
    with pytest.raises(ValueError, match=r"gate_proj.weight' in .*model.safetensors"):
        kt.adapt_gemma2(edited)
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    file.unlink()
    with pytest.raises(ValueError, match="pytorch_model.bin: pickles can run code"):
        kt.adapt_gemma2(tmp_path / "hf")
    file.write_bytes(b"PK\x03\x04" + b"\xff" * 100)
    with pytest.raises(ValueError, match="model.safetensors.*never opened"):
        kt.adapt_gemma2(tmp_path / "hf")

"""Parity with transformers, both ways."""

import json

import keras
import numpy as np
import pytest
from helpers.hugging_face import WINDOW, save_t5gemma
from helpers.models import forward, max_difference, numpy, random_inputs
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

import keras_t5gemma as kt
from keras_t5gemma.checkpoints import huggingface

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_t5gemma(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def reference(folder):
    return load_reference(folder)


@pytest.fixture(scope="module")
def ours(folder):
    return kt.Backbone.from_preset(folder)


def load_reference(folder):
    """Their model with the official encoder window, one less than theirs."""
    model = transformers.T5GemmaForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()
    model.config.encoder.sliding_window = WINDOW - 1
    return model


def run_reference(model, x):
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(x["encoder_token_ids"]).long(),
            attention_mask=torch.tensor(x["encoder_padding_mask"]),
            decoder_input_ids=torch.tensor(x["decoder_token_ids"]).long(),
            decoder_attention_mask=torch.tensor(x["decoder_padding_mask"]),
        )
    return out.encoder_last_hidden_state.float().numpy(), out.logits.float().numpy()


def run_ours(backbone, x):
    out = forward(backbone, x)
    logits = backbone.logits(out["decoder_sequence_output"])
    return numpy(out["encoder_sequence_output"]), numpy(logits)


@pytest.mark.parametrize(("source", "target"), [(6, 6), (20, 14), (40, 33)])
def test_states_and_logits_equal_transformers(ours, reference, source, target):
    x = random_inputs(3, source, target, vocabulary=200)
    x["encoder_padding_mask"][1, source // 2 :] = 0
    x["decoder_padding_mask"][1, target // 2 :] = 0
    states, logits = run_ours(ours, x)
    their_states, their_logits = run_reference(reference, x)
    seen = x["encoder_padding_mask"].astype(bool)
    assert np.abs(states[seen] - their_states[seen]).max() <= 1e-4
    seen = x["decoder_padding_mask"].astype(bool)
    assert np.abs(logits[seen] - their_logits[seen]).max() <= 1e-4
    # The test is worth something only while the caps bite.
    assert np.abs(their_logits).max() > 10


def test_windows_matter(ours, folder):
    """Without the adjusted window their encoder differs: ours is the official."""
    theirs = transformers.T5GemmaForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()
    x = random_inputs(1, 40, 6, vocabulary=200)
    states, _ = run_ours(ours, x)
    assert np.abs(states - run_reference(theirs, x)[0]).max() > 1e-2


def generate_both(ours, reference, stops, **options):
    """Padded sources through both; `(our arrays, their ids)` `(rows, 20)`."""
    x = random_inputs(3, 20, 1, vocabulary=200, seed=3)
    x["encoder_padding_mask"][1, 9:] = 0
    with torch.no_grad():
        theirs = reference.generate(
            input_ids=torch.tensor(x["encoder_token_ids"]).long(),
            attention_mask=torch.tensor(x["encoder_padding_mask"]),
            max_new_tokens=19,
            do_sample=False,
            decoder_start_token_id=2,
            eos_token_id=list(stops),
            pad_token_id=0,
            early_stopping=False,
            **options,
        ).numpy()
    out = kt.Seq2SeqLM(ours).generate(
        {k: v for k, v in x.items() if k.startswith("encoder")},
        max_length=20,
        stop_token_ids=stops,
        **options,
    )
    out = {name: array.reshape(-1, 20) for name, array in out.items()}
    return out, np.pad(theirs, ((0, 0), (0, 20 - theirs.shape[1])))


def test_greedy_equals_transformers_token_for_token(ours, reference):
    out, theirs = generate_both(ours, reference, (1,))
    mask = out["decoder_padding_mask"]
    assert (theirs * mask == out["decoder_token_ids"]).all()
    assert (mask.sum(axis=1) > 5).any()


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 1.0},
        {"num_beams": 3, "length_penalty": 0.0},
        {"num_beams": 2, "length_penalty": 2.5, "num_return_sequences": 2},
        {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "min_new_tokens": 6},
        {"num_beams": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    ],
    ids=str,
)
def test_beams_and_penalties_equal_transformers(ours, reference, options):
    stops = (1, 30, 63, 114, 117, 150)  # So that beams end at different times.
    out, theirs = generate_both(ours, reference, stops, **options)
    mask = out["decoder_padding_mask"]
    assert (out["decoder_token_ids"] == theirs * mask).all()
    if options.get("length_penalty", 0.0) == 0.0 or "no_repeat_ngram_size" in options:
        assert mask.min() == 0


@pytest.mark.one_backend
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_reads_every_float_type_sharded_or_not(tmp_path, dtype):
    whole = save_t5gemma(tmp_path / "a", dtype=getattr(torch, dtype))
    sharded = save_t5gemma(
        tmp_path / "b", dtype=getattr(torch, dtype), max_shard_size="50KB"
    )
    assert len(list(sharded.glob("*.safetensors"))) > 1
    a, b = (kt.Backbone.from_preset(f) for f in (whole, sharded))
    for x, y in zip(a.weights, b.weights, strict=True):
        assert max_difference(x, y) == 0
    kernel = safetensors_torch.load_file(whole / "model.safetensors")
    kernel = kernel["model.decoder.layers.1.cross_attn.k_proj.weight"].float().numpy()
    ours = a.decoder.blocks[1].cross_attention.key.kernel
    assert (numpy(ours) == kernel.T).all()
    half = kt.Backbone.from_preset(whole, dtype="bfloat16")
    assert all(v.dtype == "bfloat16" for v in half.weights)


def test_nothing_is_initialized_at_random(folder, monkeypatch):
    def refuse(self, shape, dtype=None):
        # Shape inference asks for placeholders, which cost nothing.
        assert in_symbolic_scope(), "a weight was drawn at random"
        return keras.ops.zeros(shape, dtype)

    monkeypatch.setattr(keras.initializers.RandomNormal, "__call__", refuse)
    backbone = kt.Backbone.from_preset(folder)
    if keras.config.backend() == "torch":
        parameters = list(kt.Seq2SeqLM(backbone).parameters())
        assert {p.device.type for p in parameters} == {"cpu"}
        assert sum(p.numel() for p in parameters) == backbone.count_params()
    with pytest.raises(AssertionError, match="at random"):
        kt.Backbone(backbone.config)


def test_reads_the_configs_of_older_transformers(folder):
    config = json.loads((folder / "config.json").read_text())
    expected = huggingface.read_config(config)
    for stack in (config["encoder"], config["decoder"]):  # As 4.53 wrote them.
        stack["rope_theta"] = stack.pop("rope_parameters")["rope_theta"]
        del stack["layer_types"]
    assert huggingface.read_config(config) == expected


def test_from_preset_reads_the_folder_with_its_tokenizer(folder, proto, tmp_path):
    path = tmp_path / "t5gemma-b-b-ul2-it"
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    (path / "tokenizer.model").write_bytes(proto)
    with pytest.raises(ValueError, match="480 ids, the model only 200"):
        kt.Seq2SeqLM.from_preset(path)
    preprocessor = kt.Seq2SeqLMPreprocessor.from_preset(path)
    assert preprocessor.template == "instruction"
    model = kt.Seq2SeqLM.from_preset(path, preprocessor=None, dtype="bfloat16")
    assert model.backbone.variable_dtype == "bfloat16"


def test_kerashub_agrees_inside_the_window(tmp_path):
    """The same folder through KerasHub's converter; past the window it is wrong."""
    keras_hub = pytest.importorskip("keras_hub")
    pytest.importorskip("tensorflow")  # KerasHub's loader of safetensors asks for it.
    folder = save_t5gemma(tmp_path / "hub")
    theirs = keras_hub.models.T5GemmaBackbone.from_preset(str(folder))
    ours = kt.Backbone.from_preset(folder)
    x = random_inputs(2, WINDOW, WINDOW, vocabulary=200)
    x["encoder_padding_mask"][1, 5:] = 0
    hidden = forward(theirs, x)["decoder_sequence_output"]
    logits = theirs.decoder_token_embedding(hidden, reverse=True)
    logits = keras.ops.tanh(logits / 30.0) * 30.0
    assert max_difference(run_ours(ours, x)[1], logits) <= 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard", [None, "50KB"])
def test_round_trip_is_bit_exact(tmp_path, dtype, shard):
    """Theirs, ours in memory, ours on disk, theirs again."""
    save = {"max_shard_size": shard} if shard else {}
    source = save_t5gemma(tmp_path / "a", dtype=getattr(torch, dtype), **save)
    kt.Backbone.from_preset(source, dtype=dtype).save_to_preset(tmp_path / "b")
    ours = kt.Backbone.from_preset(tmp_path / "b", dtype=dtype)
    size = 5e-5 if shard else 5
    ours.save_to_huggingface(tmp_path / "c", max_shard_size=size)
    assert len(list((tmp_path / "c").glob("*.safetensors"))) > 1 or not shard
    assert read_all(source).keys() == read_all(tmp_path / "c").keys()
    for name, tensor in read_all(source).items():
        other = read_all(tmp_path / "c")[name]
        assert tensor.dtype == other.dtype and torch.equal(tensor, other), name
    configs = [
        transformers.T5GemmaConfig.from_pretrained(tmp_path / x).to_dict()
        for x in ("a", "c")
    ]
    for config in configs:
        config.pop("_name_or_path", None)
    assert configs[0] == configs[1]


def read_all(folder):
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in safetensors_torch.load_file(file).items()
    }


def test_transformers_loads_the_export_and_gives_our_logits(tmp_path, tokenizer):
    from helpers.models import tiny_model

    model = tiny_model(tokenizer, template="instruction")
    model.save_to_huggingface(tmp_path)
    theirs = load_reference(tmp_path)
    x = random_inputs(2, 20, 14)
    x["encoder_padding_mask"][1, 9:] = 0
    difference = run_ours(model.backbone, x)[1] - run_reference(theirs, x)[1]
    assert np.abs(difference).max() <= 1e-5
    assert theirs.generation_config.eos_token_id == [1, 107] or (
        theirs.generation_config.eos_token_id == list(model.preprocessor.stop_ids)
    )
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "A tool for  two players.\nhéllo 你好 🙂"
    assert their_tokenizer(text)["input_ids"] == tokenizer.tokenize(text)
    turn = "<start_of_turn>user\nA board<end_of_turn>\n"
    ids = their_tokenizer(turn)["input_ids"]
    assert ids == tokenizer.tokenize(turn, parse_control_tokens=True)
    with torch.no_grad():
        out = theirs.generate(
            torch.tensor([tokenizer.tokenize("A board")]), max_new_tokens=7
        )
    ours = model.generate(
        {"encoder_token_ids": np.array([tokenizer.tokenize("A board")], "int32")},
        max_length=8,
        stop_token_ids=model.preprocessor.stop_ids,
    )["decoder_token_ids"][0]
    assert (out[0].numpy() == ours[: len(out[0])]).all()


@pytest.mark.one_backend
def test_lora_is_merged_and_quantized_models_are_refused(tmp_path, tokenizer):
    from helpers.models import tiny_model

    model = tiny_model(tokenizer)
    model.enable_lora(2)
    for variable in model.trainable_variables:
        variable.assign(np.full(variable.shape, 0.1, "float32"))
    model.save_to_huggingface(tmp_path / "lora")
    x = random_inputs()
    expected = run_ours(model.backbone, x)[1]
    loaded = kt.Backbone.from_preset(tmp_path / "lora")
    assert np.abs(run_ours(loaded, x)[1] - expected).max() < 1e-5
    model = tiny_model(tokenizer)
    model.quantize("int8")
    with pytest.raises(ValueError, match="quantized model cannot be exported"):
        model.save_to_huggingface(tmp_path / "int8")
    assert not (tmp_path / "int8").exists()


@pytest.mark.one_backend
def test_export_refuses_what_transformers_cannot_say(tmp_path):
    import dataclasses

    from helpers.models import tiny_config

    config = tiny_config()
    stack = dataclasses.replace(config.encoder, query_scale=0.3)
    odd = kt.Backbone(dataclasses.replace(config, encoder=stack))
    with pytest.raises(ValueError, match="`encoder.query_scale` must be 1 / sqrt"):
        odd.save_to_huggingface(tmp_path)
    with pytest.raises(ValueError, match="`dtype` must be one of.*'int8'"):
        kt.Backbone(config).save_to_huggingface(tmp_path, dtype="int8")

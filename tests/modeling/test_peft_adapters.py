"""Adapter folders of the peft library, in both directions, with equal logits."""

import json

import numpy as np
import pytest
from helpers import hugging_face
from helpers.hugging_face import randomize
from helpers.models import numpy, random_inputs

import keras_t5gemma as kt

pytestmark = [
    pytest.mark.one_backend,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # Of peft, about itself.
    pytest.mark.filterwarnings("ignore:.*embeddings:UserWarning"),
]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

STACK = {**hugging_face.STACK, "vocab_size": 60}
INPUTS = random_inputs(2, 6, 5, vocabulary=60)
TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of transformers."""
    folder = tmp_path_factory.mktemp("base")
    decoder = {**STACK, "hidden_size": 24}
    config = transformers.T5GemmaConfig(encoder=STACK, decoder=decoder, vocab_size=60)
    model = transformers.T5GemmaForConditionalGeneration(config)
    randomize(model.parameters())
    model.save_pretrained(folder)
    return folder


def load_theirs(base):
    cls = transformers.T5GemmaForConditionalGeneration
    return cls.from_pretrained(base, attn_implementation="eager").eval()


def their_logits(model):
    ids = {k: torch.tensor(v).long() for k, v in INPUTS.items()}
    with torch.no_grad():
        out = model(
            input_ids=ids["encoder_token_ids"],
            attention_mask=ids["encoder_padding_mask"],
            decoder_input_ids=ids["decoder_token_ids"],
            decoder_attention_mask=ids["decoder_padding_mask"],
        )
    return out.logits.numpy()


def our_logits(backbone):
    states = backbone(INPUTS)["decoder_sequence_output"]
    return numpy(backbone.logits(states))


def make_adapter(base, folder, **options):
    """An adapter that PEFT has written, and the model it belongs to."""
    options = {"r": 3, "lora_alpha": 12, "target_modules": TARGETS, **options}
    model = peft.get_peft_model(load_theirs(base), peft.LoraConfig(**options))
    randomize((p for n, p in model.named_parameters() if "lora_" in n), 0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "target_modules": ["k_proj", "o_proj"]},
        {"target_modules": r".*encoder.*(embed_tokens|up_proj)"},
    ],
    ids=str,
)
def test_peft_adapters_give_pefts_logits(base, tmp_path, options):
    theirs = make_adapter(base, tmp_path, **options)
    ours = kt.Backbone.from_preset(base)
    before = our_logits(ours)
    ours.load_lora_weights(tmp_path)
    expected = their_logits(theirs)
    assert np.abs(our_logits(ours) - expected).max() <= 1e-5
    assert np.abs(before - expected).max() > 0.01
    merged = theirs.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    # PEFT says in config.json that the logit table is separate; it wrote one table.
    with pytest.warns(UserWarning, match="separate logit table.*used for both"):
        plain = kt.Backbone.from_preset(tmp_path / "merged")
    assert np.abs(our_logits(plain) - expected).max() <= 1e-5


def randomize_ours(backbone):
    rng = np.random.default_rng(0)
    for variable in backbone.trainable_variables:
        variable.assign(rng.normal(0, 0.3, variable.shape).astype("float32"))


def test_our_adapters_give_our_logits_in_peft(base, tmp_path):
    ours = kt.Backbone.from_preset(base)
    ours.enable_lora(2, parts=["encoder", "cross_attention", "mlp"])
    randomize_ours(ours)
    ours.save_lora_weights(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(load_theirs(base), tmp_path / "adapter")
    expected = our_logits(ours)
    assert np.abs(their_logits(theirs.eval()) - expected).max() <= 1e-5
    again = kt.Backbone.from_preset(base)
    again.load_lora_weights(tmp_path / "adapter")
    assert np.abs(our_logits(again) - expected).max() <= 1e-6
    ours.save_lora_weights(tmp_path / "adapter")  # It replaces ours.


def test_an_encoder_alone(base, tmp_path):
    ours = kt.Backbone.from_preset(base, encoder_only=True)
    ours.enable_lora(2, parts=["encoder", "embeddings"])
    randomize_ours(ours)
    ours.save_lora_weights(tmp_path / "a")
    config = transformers.T5GemmaConfig.from_pretrained(base)
    config.is_encoder_decoder = False
    theirs = transformers.T5GemmaEncoderModel.from_pretrained(
        base, config=config, attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    ids = INPUTS["encoder_token_ids"], INPUTS["encoder_padding_mask"]
    with torch.no_grad():
        ids_, mask = (torch.tensor(x).long() for x in ids)
        expected = theirs(input_ids=ids_, attention_mask=mask).last_hidden_state
    assert np.abs(numpy(ours.encode(*ids)) - expected.numpy()).max() <= 1e-5


def edit(**changes):
    def apply(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(use_dora=True), "use_dora True; only False"),
        (edit(bias="all"), "bias 'all'; only 'none'"),
        (edit(rank_pattern={"q_proj": 8}), "rank_pattern.*'q_proj': 8"),
        (edit(alpha_pattern={"q_proj": 8}), "alpha_pattern"),
        (edit(modules_to_save=["lm_head"]), "modules_to_save.*lm_head"),
        (edit(peft_type="IA3"), "peft_type 'IA3'; only 'LORA'"),
        (edit(init_lora_weights="pissa"), "init_lora_weights 'pissa'"),
        (edit(r=5), r"factors .*lora_A.weight' \(3, 24\).*need \(5, 24\)"),
        (edit(r=0), "adapter_config.json: r.* 0"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model"),
    ],
)
def test_other_adapters_are_refused(base, tmp_path, change, message):
    make_adapter(base, tmp_path, target_modules=["q_proj"])
    change(tmp_path)
    ours = kt.Backbone.from_preset(base)
    with pytest.raises(ValueError, match=message):
        ours.load_lora_weights(tmp_path)
    assert not any("lora" in v.path for v in ours.variables)


def test_adapters_of_other_layers_are_refused(base, tmp_path):
    make_adapter(base, tmp_path / "a", target_modules=["q_proj"])
    encoder = kt.Backbone.from_preset(base, encoder_only=True)
    with pytest.raises(ValueError, match="decoder.*belongs to another model"):
        encoder.load_lora_weights(tmp_path / "a")
    make_adapter(base, tmp_path / "b", target_modules=["embed_tokens"])
    ours = kt.Backbone.from_preset(base)
    with pytest.raises(ValueError, match="decoder.embed_tokens cannot be moved"):
        ours.load_lora_weights(tmp_path / "b")
    ours.enable_lora(2, parts=["embeddings"])
    with pytest.raises(ValueError, match="decoder/token_embedding cannot be moved"):
        ours.save_lora_weights(tmp_path / "c")
    assert not (tmp_path / "c").exists()

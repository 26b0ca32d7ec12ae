import json
import shutil
import socket
import sys
import time
import types
from pathlib import Path

import keras
import pytest
from helpers.models import max_difference, numpy, tiny_model

import keras_t5gemma as kt
from keras_t5gemma.checkpoints import catalog, hub, presets
from keras_t5gemma.conversion.convert import convert


def test_the_32_published_names_and_their_counts():
    rows = {row.name: row for row in kt.presets()}
    published = [r for r in rows.values() if r.sources[0].startswith("hf://")]
    assert len(published) == 32
    assert rows["t5gemma_9b_2b_ul2_it"] == catalog.Preset(
        name="t5gemma_9b_2b_ul2_it",
        description="9B encoder, 2B decoder, instruction-tuned, UL2.",
        objective="UL2",
        tuned=True,
        parameters=12_292_375_296,
        sources=(
            "hf://google/t5gemma-9b-2b-ul2-it",
            "kaggle://keras/t5-gemma/keras/t5gemma_9b_2b_ul2_it/1",
        ),
    )


def test_published_names_and_handles_are_kerashubs():
    keras_hub = pytest.importorskip("keras_hub")

    theirs = keras_hub.models.T5GemmaBackbone.presets
    ours = {row.name: row for row in kt.presets()}
    published = {n: r for n, r in ours.items() if len(r.sources) == 2}
    assert set(theirs) == set(published)
    for name, row in published.items():
        assert row.sources[1] == theirs[name]["kaggle_handle"]
        assert row.parameters == theirs[name]["metadata"]["params"]


def test_a_published_name_without_weights_needs_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(presets, "get_file", refuse)
    small = kt.StackConfig(1, 8, 8, 2, 1, 4)
    config = kt.T5GemmaConfig.pair(small, small, vocabulary_size=32)
    monkeypatch.setattr(catalog, "published_config", lambda name: config)
    model = kt.Seq2SeqLM.from_preset("t5gemma_s_s_ul2", load_weights=False)
    assert model.preprocessor is None
    assert model.backbone.config == config
    tower = kt.Backbone.from_preset("t5gemma_s_s_ul2", False, encoder_only=True)
    assert tower.decoder is None


def test_published_configurations_are_in_the_package():
    config = catalog.published_config("t5gemma_xl_xl_ul2")
    assert config == kt.T5GemmaConfig.pair("xl", "xl")
    assert catalog.published_config("t5gemma_mini_synopsis") is None


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match="Did you mean t5gemma_b_b_prefixlm_it"):
        kt.Seq2SeqLM.from_preset("t5gema_b_b_prefixlm_it")
    with pytest.raises(ValueError, match="`preset` must be a string; got 3"):
        kt.Seq2SeqLM.from_preset(3)


def test_folders_that_are_no_preset(tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        kt.Seq2SeqLM.from_preset(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        kt.Seq2SeqLM.from_preset(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"must hold a JSON object; got \[1\]"):
        kt.Seq2SeqLM.from_preset(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    with pytest.raises(ValueError, match="not a checkpoint of T5Gemma.*'gemma2'"):
        kt.Seq2SeqLM.from_preset(tmp_path)


OPENED: list | None = None  # Paths that were opened, while a test asks for them.


def note_open(event, args):
    # Without a mode it is `os.open`, called by `open` with an opener for the same file.
    if event == "open" and args[1] is not None and OPENED is not None:
        OPENED.append(str(args[0]))


sys.addaudithook(note_open)


@pytest.fixture
def count_reads(monkeypatch):
    """Call a function; how often a config.json was opened and a preset located."""
    located = []
    locate = presets.locate

    def counted(preset, *args):
        located.append(preset)
        return locate(preset, *args)

    monkeypatch.setattr(presets, "locate", counted)

    def count(function):
        located.clear()
        monkeypatch.setitem(globals(), "OPENED", [])
        function()
        opened = [path for path in OPENED if Path(path).name == "config.json"]
        opened = [path for path in opened if "/converted/" not in path]  # Written.
        monkeypatch.setitem(globals(), "OPENED", None)
        return len(opened), len(located)

    return count


@pytest.mark.one_backend
@pytest.mark.parametrize("kind", ["ours", "transformers", "quantized", "embedded"])
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`")
def test_a_preset_is_resolved_once_and_its_config_read_once(
    kind, tokenizer, tmp_path, count_reads
):
    preset = tmp_path
    if kind == "embedded":
        preset = "t5gemma_mini"
    elif kind == "transformers":
        tiny_model(tokenizer).save_to_huggingface(tmp_path)
    else:
        model = tiny_model(tokenizer)
        if kind == "quantized":
            model.quantize("int8")
        model.save_to_preset(tmp_path)
    calls = {
        "Backbone": lambda: kt.Backbone.from_preset(preset),
        "encoder": lambda: kt.Backbone.from_preset(preset, encoder_only=True),
        "Seq2SeqLM": lambda: kt.Seq2SeqLM.from_preset(preset),
        "Seq2SeqLM, random": lambda: kt.Seq2SeqLM.from_preset(preset, False),
        "preprocessor": lambda: kt.Seq2SeqLMPreprocessor.from_preset(preset),
        "Tokenizer": lambda: kt.Tokenizer.from_preset(preset),
        "TextEmbedder": lambda: kt.TextEmbedder.from_preset(preset),
    }
    if kind != "quantized":
        calls["convert"] = lambda: convert(preset, tmp_path / "converted")
    counts = {name: count_reads(call) for name, call in calls.items()}
    assert counts == dict.fromkeys(calls, (1, 1))


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "cls", [kt.Seq2SeqLM, kt.Backbone, kt.Tokenizer, kt.Seq2SeqLMPreprocessor]
)
def test_unknown_keywords_are_refused(cls, model, tmp_path):
    """Trap: KerasHub's tasks swallow them."""
    model.save_to_preset(str(tmp_path))
    with pytest.raises(ValueError, match=r"unknown keywords \['dtyp'\]"):
        cls.from_preset(tmp_path, dtyp="bfloat16")


def test_dtype_and_random_weights(model, tmp_path):
    model.save_to_preset(str(tmp_path))
    half = kt.Seq2SeqLM.from_preset(tmp_path, dtype="bfloat16")
    assert half.backbone.variable_dtype == "bfloat16"
    half.save_to_preset(str(tmp_path / "half"))
    lifted = kt.Seq2SeqLM.from_preset(tmp_path / "half")
    assert lifted.backbone.variable_dtype == "float32"
    for a, b in zip(half.backbone.weights, lifted.backbone.weights, strict=True):
        assert (numpy(a) == numpy(b)).all()
    random = kt.Backbone.from_preset(tmp_path, load_weights=False)
    kernel, loaded = (
        b.encoder.blocks[0].mlp.up.kernel for b in (random, model.backbone)
    )
    assert (numpy(kernel) != numpy(loaded)).any()
    assert kt.Seq2SeqLM.from_preset(tmp_path, preprocessor=None).preprocessor is None


def test_keras_hub_base_classes_find_our_preset_and_only_ours(tokenizer, tmp_path):
    """Trap: a task sharing KerasHub's backbone class hijacks its `from_preset`."""
    keras_hub = pytest.importorskip("keras_hub")

    if not issubclass(kt.Backbone, keras_hub.models.Backbone):
        pytest.skip("KerasHub was imported after keras_t5gemma; set KERAS_HUB_BASES.")
    tiny_model(tokenizer).save_to_preset(str(tmp_path))
    found = keras_hub.models.Seq2SeqLM.from_preset(str(tmp_path))
    assert type(found) is kt.Seq2SeqLM
    assert kt.Seq2SeqLM.backbone_cls is kt.Backbone
    objects = keras.saving.get_custom_objects()
    ours = [k for k, v in objects.items() if v.__module__.startswith("keras_t5gemma")]
    assert ours and all(name.startswith("keras_t5gemma>") for name in ours)
    shared = [
        v
        for v in objects.values()
        if getattr(v, "backbone_cls", None) is keras_hub.models.T5GemmaBackbone
    ]
    assert all(v.__module__.startswith("keras_hub") for v in shared)


@pytest.mark.one_backend
def test_handles_go_through_the_hubs_own_clients(model, tmp_path, monkeypatch):
    """A published name from Hugging Face, ours from both hubs; only what is needed."""
    import huggingface_hub
    import kagglehub

    model.save_to_huggingface(tmp_path / "theirs")
    model.save_to_preset(tmp_path / "ours")
    asked = []

    def folder_of(handle):
        return tmp_path / ("theirs" if handle.startswith("google/") else "ours")

    def download_file(repo_id, filename, local_files_only):
        asked.append(filename)
        if not (folder_of(repo_id) / filename).exists():
            raise FileNotFoundError(filename)
        return str(folder_of(repo_id) / filename)

    def snapshot(handle, allow_patterns, local_files_only):
        asked.append("everything")
        return str(folder_of(handle))

    def kaggle(handle, path=None):
        asked.append(path or "everything")
        found = folder_of(handle) / (path or "")
        if not found.exists():
            raise ValueError(f"{path} is not present in the model files.")
        return str(found)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download_file)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(kagglehub, "model_download", kaggle)
    for preset in (
        "t5gemma_s_s_prefixlm_it",
        "hf://me/mine",
        "kaggle://me/model/keras/mine",
    ):
        loaded = kt.Seq2SeqLM.from_preset(preset)
        assert max_difference(loaded.weights[0], model.weights[0]) == 0
        template = "instruction" if preset.endswith("_it") else None
        assert loaded.preprocessor.template == template
    asked.clear()
    kt.Tokenizer.from_preset("kaggle://me/model/keras/mine")
    kt.Backbone.from_preset("hf://me/mine", load_weights=False)
    assert "everything" not in asked and len(asked) <= 4
    with pytest.raises(ValueError, match="must start with hf:// or kaggle://"):
        presets.download("gs://bucket/folder")


@pytest.mark.parametrize("error", [ConnectionError, FileNotFoundError])
def test_failed_download_says_what_to_do(monkeypatch, error):
    def offline(*args, **kwargs):
        raise error("no route")

    monkeypatch.setattr(presets, "get_file", offline)
    with pytest.raises(OSError, match="license.*hf auth login.*passed as a path") as e:
        kt.Seq2SeqLM.from_preset("t5gemma_b_b_prefixlm_it")
    elsewhere = "kaggle://keras/t5-gemma/keras/t5gemma_b_b_prefixlm_it/1"
    assert f"The same weights are at {elsewhere}." in str(e.value)


def test_a_hub_that_is_not_reached_is_no_missing_file(monkeypatch, tmp_path):
    """The library raises a FileNotFoundError for both."""
    import huggingface_hub
    from huggingface_hub import errors

    def raises(error):
        def download(handle, name, local_files_only):
            raise error("of the library")

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)

    def read():
        return presets.read_json("hf://me/mine", "task.json", default={"none": True})

    def remember(value):
        monkeypatch.setattr(
            huggingface_hub, "try_to_load_from_cache", lambda handle, name: value
        )

    remember(None)
    raises(errors.EntryNotFoundError)
    assert read() == {"none": True}
    raises(errors.LocalEntryNotFoundError)
    with pytest.raises(OSError, match="ConnectionError: task.json is not in the local"):
        read()
    remember(object())  # An earlier download found that there is none.
    assert read() == {"none": True}


def test_without_network_a_handle_fails_at_once(monkeypatch):
    """The library alone tries again for 23 seconds."""

    def no_address(*args):
        raise socket.gaierror("no address")

    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    start = time.monotonic()
    for name in ("hf://me/no-such-model", "t5gemma_b_b_prefixlm_it"):
        with pytest.raises(OSError, match="the hub was not reached.*hf auth login"):
            kt.Seq2SeqLM.from_preset(name)
    with pytest.raises(OSError, match="could not be downloaded"):
        presets.download("hf://me/no-such-model")
    assert time.monotonic() - start < 8


def test_files_missing_on_kaggle(monkeypatch):
    import kagglehub
    from kagglehub.exceptions import KaggleApiHTTPError

    def answers(error):
        def download(handle, path):
            raise error

        monkeypatch.setattr(kagglehub, "model_download", download)

    handle = "kaggle://me/model/keras/mine"
    response = types.SimpleNamespace(status_code=404, headers={}, text="")
    answers(KaggleApiHTTPError("404", response=response))
    assert presets.read_json(handle, "task.json", default={}) == {}
    answers(ValueError("x is not present in the model files. You can access"))
    assert presets.read_json(handle, "task.json", default={}) == {}
    response = types.SimpleNamespace(status_code=403, headers={}, text="")
    answers(KaggleApiHTTPError("403", response=response))
    with pytest.raises(OSError, match="403.*KAGGLE_KEY"):
        presets.read_json(handle, "task.json", default={})


def test_missing_keras_hub_says_how_to_install_it(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps 'keras-hub>="):
        model.compile(sampler="contrastive")
    with pytest.raises(ValueError, match=r"Gemma 2 presets \(which need keras-hub\)"):
        kt.adapt_gemma2("gemma2_2b_en")


EMBEDDED = "t5gemma_mini_synopsis"


@pytest.fixture(scope="module")
def embedded():
    model = kt.Seq2SeqLM.from_preset(EMBEDDED)
    model.compile(sampler="beam")
    return model


def test_embedded_preset_summarises_a_real_paragraph(embedded):
    text = (
        "This package provides a small command line program that converts images "
        "between many formats, among them PNG, JPEG and TIFF. It can also resize "
        "them and change their colours."
    )
    answer = embedded.generate(text)
    assert 2 <= len(answer.split()) <= 20
    words = answer.lower()
    assert any(word in words for word in ("image", "convert", "format"))
    assert embedded.generation_defaults["repetition_penalty"] == 1.5


def test_embedded_preset_prefers_the_right_synopsis(embedded):
    text = (
        "This library reads and writes files in the JSON format. It is written in "
        "C and has no dependencies."
    )
    right, wrong = "library to read and write JSON files", "strategy game in space"
    scores = embedded.score([text, text], [right, wrong])["log_prob"]
    assert scores[0] > scores[1] + 10


def test_embedded_presets_are_small_and_documented():
    embedded = [p for p in kt.presets() if "://" not in p.sources[0]]
    assert [(p.name, p.objective, p.tuned) for p in embedded] == [
        ("t5gemma_mini", "UL2 and PrefixLM", False),
        ("t5gemma_mini_synopsis", "supervised", True),
    ]
    assert sum(2 * p.parameters for p in embedded) < 25e6  # Bytes, in bfloat16.
    for preset in embedded:
        folder = Path(preset.sources[0])
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        assert size < 13e6
        card = (folder / "README.md").read_text()
        for word in ("How it was made", "Data", "Rebuild", "Scores", "Limits"):
            assert f"## {word}" in card


@pytest.mark.one_backend
def test_damaged_preset_is_refused(tmp_path, model):
    model.save_to_preset(str(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "model.weights.h5").unlink()
    with pytest.raises(ValueError, match="has no weights: neither model.weights.h5"):
        kt.Seq2SeqLM.from_preset(tmp_path / "b")

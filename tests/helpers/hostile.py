"""Wrong arguments for every public name: what is called, and with which values."""

import dataclasses
import functools
import itertools
import json

import numpy as np

import keras_t5gemma as kt
from helpers.gemma2 import SMALL, make_gemma2
from helpers.models import one_block_config
from keras_t5gemma.data.pair_dataset import PairDataset
from keras_t5gemma.tokenization.token_ids import INPUTS

# Functions: generators are used up, and calls may change what they get.
VALUES = [
    *(lambda value=value: value for value in (
        None, True, False, 0, -1, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.5,
        float("nan"), float("inf"), -float("inf"), 1j, b"", b"\xff\xfe", "", "x",
        "\ud83d", "a\0b", (), ("a",), frozenset(), range(3), Ellipsis, int, len,
        np.float32(0.5), np.int64(-7), np.bool_(True), np.nan, np.datetime64("2020"),
    )),
    list, dict, set, object,
    lambda: [[]], lambda: [[[]]], lambda: [[1, 2], [3]], lambda: [0.5], lambda: [None],
    lambda: ["a", None], lambda: ["a", 5], lambda: [b"\xff"], lambda: ["\ud83d"],
    lambda: {"a": 1}, lambda: {1: 2}, lambda: {"text": None}, lambda: {None: []},
    lambda: {"encoder_text": 5, "decoder_text": 5},
    lambda: {"encoder_token_ids": [[]]}, lambda: [2**63], lambda: [-1],
    lambda: np.zeros(0), lambda: np.zeros((0, 3), "int32"), lambda: np.zeros((2, 0)),
    lambda: np.full((2, 2), np.nan), lambda: np.zeros((1, 1, 1), "int32"),
    lambda: np.array(5), lambda: np.array("x"), lambda: np.array([object()]),
    lambda: np.array([[0.5, 1.5]]), lambda: np.array(["a", "b"], "S1"),
    lambda: (i for i in ()), lambda: (i for i in (1, None, "a")), itertools.count,
    lambda: itertools.repeat(["a"]), lambda: itertools.repeat(None), lambda: _endless(),
    lambda: nested(100),
]  # fmt: skip


def is_never_a_number(value):
    """Whether no number of rows, steps, seconds or the like may be this value."""
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        return not 0 <= value < 1e300
    return not isinstance(value, str | None | np.bool_ | np.ndarray)


def _endless():
    while True:
        yield ["a"], ["b"]


def nested(depth):
    """Lists in lists; at a depth of thousands, `repr` and Keras fail."""
    value = []
    for _ in range(depth):
        value = [value]
    return value


@dataclasses.dataclass
class Call:
    """A public call that succeeds, of which one argument at a time is replaced.

    Args:
        name: of the call.
        function: what is called, by keyword.
        valid: the arguments.
        more: arguments with a default, which are replaced too.
        also: names of an argument's parts that a message may use.
        numbers: the arguments that are numbers, at least 0 and finite.
        runs: whether it succeeds with valid arguments here.
    """

    name: str
    function: object
    valid: dict
    more: tuple = ()
    also: tuple = ()
    numbers: tuple = ()
    runs: bool = True

    @property
    def arguments(self):
        return (*self.valid, *self.more)


PAIRS = {"encoder_text": ["a", "b"], "decoder_text": ["c", "d"]}
TEXT = {"x": ["a b c d", "b c d e"]}
CLASSES = {"x": ["a", "b"], "y": [0, 1]}
SIZES = (
    "batch_size", "steps", "epochs", "steps_per_epoch", "validation_steps",
    "validation_batch_size", "max_length",
)  # fmt: skip
OF_FIT = (
    "batch_size", "epochs", "validation_data", "validation_split", "sample_weight",
    "steps_per_epoch", "validation_batch_size", "batching", "callbacks", "shuffle",
    "class_weight",
)  # fmt: skip
# Parts of data that a message may name.
PARTS = (
    *PAIRS, "encoder_token_ids", "encoder_padding_mask", "text", "x", "sample_weight",
    "anchor", "positive",
)  # fmt: skip
GENERATION = tuple(f.name for f in dataclasses.fields(kt.GenerationOptions))


class Shared:
    """Tiny models and files that the calls share."""

    def __init__(self, tokenizer, folder):
        self.tokenizer, self.folder = tokenizer, folder
        self.config = config = one_block_config()
        self.plain = plain = kt.Seq2SeqLMPreprocessor(tokenizer, 24, 8)
        self.ul2 = kt.objectives.UL2.from_tokenizer(tokenizer)
        self.documents = kt.Seq2SeqLMPreprocessor(tokenizer, 24, 24, objective=self.ul2)
        self.model = kt.Seq2SeqLM(kt.Backbone(config), plain)
        self.other = kt.Seq2SeqLM(kt.Backbone(config), self.documents)
        self.tower = kt.Backbone(dataclasses.replace(config, decoder=None))
        self.preset = folder / "preset"
        self.model.save_to_preset(self.preset)
        self.rows = folder / "rows.jsonl"
        row = {"source": "a b", "target": "c", "text": "a b"}
        self.rows.write_text(json.dumps(row) + "\n")


def quiet(function):
    return functools.partial(function, verbose=0)


def configs(s):
    """Configurations, backbones and options."""
    stack = {
        "num_layers": 1, "hidden_dim": 16, "intermediate_dim": 32,
        "num_query_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    }  # fmt: skip
    untrained = kt.Seq2SeqLM(kt.Backbone(s.config), s.plain)
    return [
        Call("StackConfig", kt.StackConfig, stack, (
            "sliding_window", "layer_types", "query_scale", "attention_soft_cap",
            "rope_base", "rms_norm_epsilon"), numbers=(*stack, "sliding_window")),
        Call("T5GemmaConfig", kt.T5GemmaConfig,
             {"encoder": s.config.encoder, "decoder": s.config.decoder},
             ("vocabulary_size", "final_soft_cap", "dropout", "max_positions"),
             numbers=("vocabulary_size", "dropout", "max_positions")),
        Call("T5GemmaConfig.pair", kt.T5GemmaConfig.pair,
             {"encoder": "s", "decoder": "s"}),
        Call("T5GemmaConfig.from_dict", kt.T5GemmaConfig.from_dict,
             {"config": s.config.to_dict()}),
        Call("Backbone", kt.Backbone, {"config": s.config}, ("lineage", "dtype")),
        Call("Backbone.from_preset", kt.Backbone.from_preset, {"preset": s.preset},
             ("load_weights", "encoder_only", "dtype", "verify_checksums")),
        Call("enable_lora", untrained.enable_lora, {"rank": 2, "parts": ["mlp"]},
             ("target_layer_names",), ("parts", "target_layer_names", "lora"),
             ("rank",), runs=False),
        Call("GenerationOptions", kt.GenerationOptions, {}, GENERATION, numbers=(
            "num_beams", "temperature", "top_k", "top_p", "repetition_penalty",
            "no_repeat_ngram_size", "min_new_tokens", "num_return_sequences", "seed",
            "max_time")),
    ]  # fmt: skip


def texts(s):
    """Tokenizer and preprocessor."""
    return [
        Call("Tokenizer", kt.Tokenizer, {"proto": s.tokenizer.proto}),
        Call("tokenize", s.tokenizer.tokenize, {"text": "a"}),
        Call("detokenize", s.tokenizer.detokenize, {"token_ids": [5]}),
        Call("id_to_token", s.tokenizer.id_to_token, {"id": 5}, numbers=("id",)),
        Call("token_to_id", s.tokenizer.token_to_id, {"token": "<eos>"}),
        Call("Seq2SeqLMPreprocessor", kt.Seq2SeqLMPreprocessor,
             {"tokenizer": s.tokenizer}, (
                 "encoder_sequence_length", "decoder_sequence_length", "template",
                 "pad_to_multiple_of", "objective"),
             numbers=("encoder_sequence_length", "decoder_sequence_length",
                      "pad_to_multiple_of")),
        Call("preprocessor", s.plain.call, {"x": PAIRS}, ("sample_weight", "y"), PARTS),
        Call("preprocessor with an objective", s.documents.call, TEXT),
        Call("generate_preprocess", s.plain.generate_preprocess, {"x": ["a"]},
             ("sequence_length",), PARTS, numbers=("sequence_length",)),
        Call("generate_postprocess", s.plain.generate_postprocess,
             {"x": {"decoder_token_ids": [[5]], "decoder_padding_mask": [[1]]}}),
    ]  # fmt: skip


def fits(s):
    """Training and evaluation of text pairs."""
    ids = s.model.preprocessor(PAIRS)
    untrained = kt.Seq2SeqLM(kt.Backbone(s.config), s.plain)
    return [
        Call("Seq2SeqLM", kt.Seq2SeqLM, {"backbone": s.model.backbone,
             "preprocessor": s.plain}),
        Call("Seq2SeqLM.from_preset", kt.Seq2SeqLM.from_preset, {"preset": s.preset},
             ("load_weights", "dtype", "preprocessor")),
        Call("compile", untrained.compile, {}, ("optimizer", "loss", "weighted_metrics",
             "sampler", "rematerialize")),
        Call("fit", quiet(s.model.fit), {"x": PAIRS}, ("y", *OF_FIT),
             PARTS, SIZES),
        Call("fit on arrays", quiet(s.model.fit),
             dict(zip(("x", "y", "sample_weight"), ids, strict=True)), OF_FIT,
             PARTS, SIZES),
        Call("fit on documents", quiet(s.other.fit), TEXT, OF_FIT, PARTS, SIZES),
        Call("evaluate", quiet(s.model.evaluate), {"x": PAIRS},
             ("y", "batch_size", "sample_weight", "steps", "batching"),
             PARTS, SIZES),
        Call("predict", quiet(s.model.predict), {"x": PAIRS},
             ("y", "batch_size", "steps"), PARTS, SIZES),
        Call("train_on_batch", s.model.train_on_batch, {"x": PAIRS},
             ("y", "sample_weight"), PARTS),
        Call("test_on_batch", s.model.test_on_batch, {"x": PAIRS},
             ("y", "sample_weight"), PARTS),
        Call("predict_on_batch", s.model.predict_on_batch, {"x": PAIRS}, (),
             PARTS),
    ]  # fmt: skip


def generations(s):
    """`generate`, `stream` and `score`."""

    def streamed(**kwargs):
        return list(s.model.stream(**{"max_length": 4, **kwargs}))

    def from_ids(**arrays):
        known = {"encoder_token_ids": [[5, 6]], "decoder_token_ids": [[2, 7]]}
        return s.model.generate({**known, **arrays}, max_length=4)

    return [
        Call("generate", functools.partial(s.model.generate, max_length=4),
             {"inputs": ["a"]},
             ("max_length", "stop_token_ids", "strip_prompt", "batch_size",
              *GENERATION), PARTS, ("max_length", "batch_size")),
        *(Call(f"generate from {name}", from_ids, {name: [[5, 6]]}) for name in INPUTS),
        Call("stream", streamed, {"text": "a"}, ("max_length", "stop_token_ids",
             *GENERATION), PARTS),
        Call("score", s.model.score, {"source": ["a"], "target": ["b"]},
             ("batch_size",), PARTS, SIZES),
    ]  # fmt: skip


def encoders(s):
    """Embedders and classifiers."""
    embedder = kt.TextEmbedder(s.tower, s.plain)
    classifier = kt.TextClassifier(s.tower, s.plain, num_classes=2)
    tagger = kt.TextClassifier(s.tower, s.plain, num_classes=2, kind="multi_label")
    regressor = kt.TextClassifier(s.tower, s.plain, kind="regression")
    arrays = {"encoder_token_ids": [[5, 6]], "encoder_padding_mask": [[1, 1]]}
    arrays = {name: np.array(array) for name, array in arrays.items()}
    return [
        Call("TextEmbedder", kt.TextEmbedder, {"backbone": s.tower,
             "preprocessor": s.plain}, ("pooling", "projection_dim", "normalize",
             "lexical_dim"), numbers=("projection_dim", "lexical_dim")),
        Call("TextEmbedder.compile", embedder.compile, {}, ("gradient_cache_rows",),
             numbers=("gradient_cache_rows",)),
        Call("embed", embedder.embed, {"texts": ["a"]}, ("batch_size", "dimensions"),
             numbers=("batch_size", "dimensions")),
        Call("hidden_states", embedder.hidden_states, {"texts": ["a"]},
             ("layers", "batch_size", "pad_to", "final_norm", "dtype", "as_numpy"),
             numbers=("batch_size", "pad_to")),
        Call("TextEmbedder.fit", quiet(embedder.fit),
             {"x": ["a", "b"], "y": ["c", "d"]}, OF_FIT,
             PARTS, SIZES),
        Call("TextEmbedder.predict", quiet(embedder.predict),
             {"x": arrays},
             ("batch_size", "steps"), PARTS, SIZES),
        Call("cosine_similarity", kt.cosine_similarity,
             {"a": np.ones((1, 2)), "b": np.ones((1, 2))}),
        Call("nearest", kt.nearest, {"queries": np.ones((1, 2)),
             "vectors": np.ones((3, 2)), "k": 2}, ("rows_at_once",),
             ("k",), ("k", "rows_at_once")),
        Call("TextClassifier", kt.TextClassifier, {"backbone": s.tower,
             "preprocessor": s.plain, "num_classes": 2}, ("class_names", "kind",
             "pooling", "dropout", "separator"), numbers=("dropout", "num_classes")),
        Call("TextClassifier.fit", quiet(classifier.fit), CLASSES, OF_FIT,
             PARTS, SIZES),
        Call("TextClassifier.evaluate", quiet(classifier.evaluate), CLASSES,
             ("batch_size", "sample_weight", "steps"), ("text", "encoder"), SIZES),
        Call("multi-label fit", quiet(tagger.fit),
             {"x": ["a", "b"], "y": [[0], [1]]}, (), PARTS),
        Call("regression fit", quiet(regressor.fit),
             {"x": ["a", "b"], "y": [0.5, 1.0]}, (), PARTS),
        Call("classify", tagger.classify, {"x": ["a"]}, ("batch_size", "threshold"),
             PARTS, SIZES),
        Call("TextClassifier.predict", classifier.predict, {"x": ["a"]},
             ("batch_size",), ("text", "encoder"), SIZES),
        Call("TextClassifier.train_on_batch", classifier.train_on_batch, CLASSES,
             ("sample_weight",), PARTS),
        Call("TextClassifier.predict_on_batch", classifier.predict_on_batch,
             {"x": ["a", "b"]}, (), PARTS),
    ]  # fmt: skip


def objectives(s):
    """Objectives and losses."""
    return [
        Call("Spans", kt.objectives.Spans, {"mean_length": 3, "rate": 0.5}, ("mode",),
             numbers=("mean_length", "rate")),
        Call("Suffix", kt.objectives.Suffix, {}, ("rate", "mode"), numbers=("rate",)),
        Call("PrefixLM", kt.objectives.PrefixLM, {"split": "half"}),
        Call("UL2", kt.objectives.UL2, {"mixture": "ul2", "sentinels": [9, 8],
             "mode_tokens": {"[NLU]": 5, "[NLG]": 6, "[S2S]": 7}}),
        Call("UL2.from_tokenizer", kt.objectives.UL2.from_tokenizer,
             {"tokenizer": s.tokenizer}, ("mixture",)),
        Call("an objective", s.ul2, {"token_ids": [[5, 6, 7]], "seeds": [0]},
             ("epoch",),
             ("seeds",), ("epoch",)),
        Call("TokenCrossEntropy", kt.TokenCrossEntropy, {}, ("label_smoothing",
             "z_loss"), numbers=("label_smoothing", "z_loss")),
        Call("InfoNCE", kt.InfoNCE, {}, ("temperature", "dimensions"),
             numbers=("temperature",)),
        Call("Distillation", kt.Distillation, {"teacher": None}, ("temperature",
             "top_k", "label_weight"), numbers=("temperature", "top_k",
             "label_weight")),
    ]  # fmt: skip


def data(s):
    """Readers, data sets, callbacks, metrics and plots."""
    history = {"loss": [2.0, 1.0], "val_loss": [2.0, 1.0]}
    data = PairDataset(s.plain, PAIRS)
    return [
        Call("PairFiles", kt.PairFiles, {"preprocessor": s.plain, "paths": [s.rows]},
             ("source", "target", "batch_size", "batching", "steps", "threads"),
             ("rows.jsonl",), ("batch_size", "steps", "threads")),
        Call("TextFiles", kt.TextFiles, {"preprocessor": s.documents, "paths": s.rows},
             ("field", "batch_size", "batching", "steps", "threads", "teacher"),
             ("rows.jsonl",), ("batch_size", "steps", "threads")),
        Call("read_pairs", kt.read_pairs, {"path": s.rows}, ("source", "target"),
             ("rows.jsonl",)),
        Call("read_texts", kt.read_texts, {"path": s.rows}, ("field",),
             ("rows.jsonl",)),
        Call("GenerationMetrics", kt.callbacks.GenerationMetrics, {"x": PAIRS},
             ("y", "metrics", "every", "max_rows", "examples", "samples", "prefix",
              "seed"), PARTS, ("every", "max_rows", "examples", "seed")),
        Call("SaveBest", kt.callbacks.SaveBest, {"folder": s.folder / "best"},
             ("monitor", "mode")),
        Call("BackupAndRestore", kt.callbacks.BackupAndRestore,
             {"folder": s.folder / "backup"}, ("save_freq",), numbers=("save_freq",)),
        Call("CrossAttentionWarmUp", kt.callbacks.CrossAttentionWarmUp, {"steps": 5},
             ("norms",), numbers=("steps",)),
        Call("TrainingReport", kt.callbacks.TrainingReport, {"data": data}),
        Call("score_texts", kt.score_texts, {"predictions": ["a"],
             "references": ["b"], "metrics": "exact_match"}, (), ("list",)),
        Call("plot_history", kt.plot_history, {"history": history}, ("path",)),
    ]  # fmt: skip


def commands(s):
    """Planning, conversion, adaptation, saving."""
    gemma = make_gemma2(**SMALL)
    convert = functools.partial(kt.convert, overwrite=True)
    average = functools.partial(kt.average_presets, overwrite=True)
    return [
        Call("TeacherScores", kt.TeacherScores, {"folder": s.folder / "no"},
             runs=False),
        Call("plan", kt.plan, {"preset": s.config, "devices": 2, "memory": "1GB",
             "batch": 8, "length": 16}, ("optimizer", "dtype", "lora_rank", "quantize",
             "strategy", "mesh", "rematerialize"),
             numbers=("devices", "memory", "batch", "length", "lora_rank"),
             also=("data", "model")),
        Call("adapt_gemma2", kt.adapt_gemma2, {"encoder": gemma}, ("decoder", "dtype",
             "cross_attention", "cross_norms", "initializer_std", "seed", "dropout"),
             ("preset",), ("initializer_std", "seed", "dropout")),
        Call("convert", convert, {"preset": s.preset,
             "folder": s.folder / "converted"}, ("to", "dtype", "max_shard_size"),
             numbers=("max_shard_size",)),
        Call("verify", kt.verify, {"a": s.preset, "b": s.preset}, ("seed",),
             ("preset",),
             ("seed",)),
        Call("average_presets", average,
             {"presets": [s.preset, s.preset], "folder": s.folder / "mean"},
             ("weights",),
             ("preset",)),
        Call("evaluate_encoders", kt.evaluate_encoders, {"tasks": "no",
             "data": s.folder,
             "output": s.folder / "out", "presets": str(s.preset)}, ("seeds",
             "learning_rates", "epochs", "batch_size", "dropout", "train_rows",
             "pooling", "lexical_dim"), numbers=("seeds", "epochs", "batch_size",
             "dropout", "train_rows", "lexical_dim", "learning_rates"),
             also=("tasks", "preset", "output"), runs=False),
        Call("distribute", kt.distribute, {}, ("strategy", "data", "model",
             "devices"), ("JAX",), runs=False),
        Call("save_to_preset", s.model.save_to_preset, {"preset_dir": s.preset}),
        Call("save_to_huggingface", s.model.save_to_huggingface,
             {"folder": s.folder / "hf"}, ("dtype", "max_shard_size"),
             numbers=("max_shard_size",)),
        Call("load_lora_weights", s.model.load_lora_weights, {"filepath": "no.lora.h5"},
             also=("file",), runs=False),
        Call("save_lora_weights", s.model.save_lora_weights, {"filepath": "no"},
             also=("adapters",), runs=False),
    ]  # fmt: skip


GROUPS = (configs, texts, objectives, data, commands, encoders, generations, fits)

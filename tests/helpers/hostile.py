"""Wrong arguments for every public name: what is called, and with which values."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
from helpers.gemma2 import SMALL, make_gemma2
from helpers.models import one_block_config

import keras_t5gemma as kt
from keras_t5gemma.data.pair_dataset import PairDataset

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
    lambda: _nested(), lambda: _cycle(),
]  # fmt: skip
# Values of these arguments are never accepted, whatever they mean.
NEVER = (-1, float("nan"), float("inf"), "x", b"", [], {}, 10**400, 1j)


def _endless():
    while True:
        yield ["a"], ["b"]


def _nested(depth=5000):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def _cycle():
    value = []
    value.append(value)
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
        free: arguments that any value may be passed for.
    """

    name: str
    function: object
    valid: dict
    more: tuple = ()
    also: tuple = ()
    numbers: tuple = ()

    @property
    def arguments(self):
        return (*self.valid, *self.more)


PAIRS = {"encoder_text": ["a", "b"], "decoder_text": ["c", "d"]}


def calls(tokenizer, folder):
    """All calls, on tiny shared models and files in `folder`."""
    folder = Path(folder)
    stack = {
        "num_layers": 1, "hidden_dim": 16, "intermediate_dim": 32,
        "num_query_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    }  # fmt: skip
    config = one_block_config()
    plain = kt.Seq2SeqLMPreprocessor(tokenizer, 24, 8)
    ul2 = kt.objectives.UL2.from_tokenizer(tokenizer)
    documents = kt.Seq2SeqLMPreprocessor(tokenizer, 24, 24, objective=ul2)
    model = kt.Seq2SeqLM(kt.Backbone(config), plain)
    other = kt.Seq2SeqLM(kt.Backbone(config), documents)
    untrained = kt.Seq2SeqLM(kt.Backbone(config), plain)
    tower = kt.Backbone(dataclasses.replace(config, decoder=None))
    embedder = kt.TextEmbedder(tower, plain)
    classifier = kt.TextClassifier(tower, plain, num_classes=2)
    tagger = kt.TextClassifier(tower, plain, num_classes=2, kind="multi_label")
    regressor = kt.TextClassifier(tower, plain, kind="regression")
    ids = model.preprocessor(PAIRS)
    preset, gemma = folder / "preset", make_gemma2(**SMALL)
    model.save_to_preset(preset)
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"source": "a b", "target": "c", "text": "a b"}) + "\n")
    history = {"loss": [2.0, 1.0], "val_loss": [2.0, 1.0]}
    data = PairDataset(plain, PAIRS)
    text = {"x": ["a b c d", "b c d e"]}
    classes = {"x": ["a", "b"], "y": [0, 1]}
    sizes = ("batch_size", "steps", "epochs", "steps_per_epoch", "validation_steps",
             "validation_batch_size", "initial_epoch", "max_length")  # fmt: skip
    of_fit = ("batch_size", "epochs", "validation_data", "validation_split",
              "sample_weight", "steps_per_epoch", "validation_batch_size",
              "batching", "callbacks", "shuffle", "class_weight")  # fmt: skip
    columns = ("encoder_text", "decoder_text", "encoder_token_ids", "text", "x",
               "sample_weight")  # fmt: skip
    quiet = {"verbose": 0}

    def of(function, **fixed):
        return lambda **kwargs: function(**{**fixed, **kwargs})

    def streamed(**kwargs):
        return list(model.stream(**{"max_length": 4, **kwargs}))

    def from_ids(**arrays):
        known = {"encoder_token_ids": [[5, 6]], "decoder_token_ids": [[2, 7]]}
        return model.generate({**known, **arrays}, max_length=4)

    generation = tuple(f.name for f in dataclasses.fields(kt.GenerationOptions))
    found = [
        Call("StackConfig", kt.StackConfig, stack, (
            "sliding_window", "layer_types", "query_scale", "attention_soft_cap",
            "rope_base", "rms_norm_epsilon"), numbers=(*stack, "sliding_window")),
        Call("T5GemmaConfig", kt.T5GemmaConfig,
             {"encoder": config.encoder, "decoder": config.decoder},
             ("vocabulary_size", "final_soft_cap", "dropout", "max_positions"),
             numbers=("vocabulary_size", "dropout", "max_positions")),
        Call("T5GemmaConfig.pair", kt.T5GemmaConfig.pair,
             {"encoder": "s", "decoder": "s"}),
        Call("T5GemmaConfig.from_dict", kt.T5GemmaConfig.from_dict,
             {"config": config.to_dict()}),
        Call("Backbone", kt.Backbone, {"config": config}, ("lineage", "dtype")),
        Call("Backbone.from_preset", kt.Backbone.from_preset, {"preset": preset},
             ("load_weights", "encoder_only", "dtype", "verify_checksums")),
        Call("Tokenizer", kt.Tokenizer, {"proto": tokenizer.proto}),
        Call("tokenize", tokenizer.tokenize, {"text": "a"}),
        Call("detokenize", tokenizer.detokenize, {"token_ids": [5]}),
        Call("id_to_token", tokenizer.id_to_token, {"id": 5}, numbers=("id",)),
        Call("token_to_id", tokenizer.token_to_id, {"token": "<eos>"}),
        Call("Seq2SeqLMPreprocessor", kt.Seq2SeqLMPreprocessor,
             {"tokenizer": tokenizer}, (
                 "encoder_sequence_length", "decoder_sequence_length", "template",
                 "pad_to_multiple_of", "objective"),
             numbers=("encoder_sequence_length", "decoder_sequence_length",
                      "pad_to_multiple_of")),
        Call("preprocessor", plain.call, {"x": PAIRS}, ("sample_weight", "y"), columns),
        Call("preprocessor with an objective", documents.call, text),
        Call("generate_preprocess", plain.generate_preprocess, {"x": ["a"]},
             ("sequence_length",), columns, numbers=("sequence_length",)),
        Call("generate_postprocess", plain.generate_postprocess,
             {"x": {"decoder_token_ids": [[5]], "decoder_padding_mask": [[1]]}}),
        Call("Seq2SeqLM", kt.Seq2SeqLM, {"backbone": model.backbone,
             "preprocessor": plain}),
        Call("Seq2SeqLM.from_preset", kt.Seq2SeqLM.from_preset, {"preset": preset},
             ("load_weights", "dtype", "preprocessor")),
        Call("compile", untrained.compile, {}, ("optimizer", "loss", "weighted_metrics",
             "sampler", "rematerialize")),
        Call("fit", of(model.fit, **quiet), {"x": PAIRS}, ("y", *of_fit),
             (*columns, "x"), sizes),
        Call("fit on arrays", of(model.fit, **quiet),
             dict(zip(("x", "y", "sample_weight"), ids, strict=True)), of_fit,
             columns, sizes),
        Call("fit on documents", of(other.fit, **quiet), text, of_fit, columns, sizes),
        Call("evaluate", of(model.evaluate, **quiet), {"x": PAIRS},
             ("y", "batch_size", "sample_weight", "steps", "batching"),
             (*columns, "x"), sizes),
        Call("predict", of(model.predict, **quiet), {"x": PAIRS},
             ("y", "batch_size", "steps"), (*columns, "x"), sizes),
        Call("train_on_batch", model.train_on_batch, {"x": PAIRS},
             ("y", "sample_weight"), (*columns, "x")),
        Call("test_on_batch", model.test_on_batch, {"x": PAIRS},
             ("y", "sample_weight"), (*columns, "x")),
        Call("predict_on_batch", model.predict_on_batch, {"x": PAIRS}, (),
             (*columns, "x")),
        Call("generate", of(model.generate, max_length=4), {"inputs": ["a"]},
             ("max_length", "stop_token_ids", "strip_prompt", "batch_size",
              *generation), columns, ("max_length", "batch_size")),
        *(Call(f"generate from {name}", from_ids, {name: [[5, 6]]}) for name in ids[0]),
        Call("stream", streamed, {"text": "a"}, ("max_length", "stop_token_ids",
             *generation), columns),
        Call("score", model.score, {"source": ["a"], "target": ["b"]},
             ("batch_size",), columns, sizes),
        Call("enable_lora", untrained.enable_lora, {"rank": 2, "parts": ["mlp"]},
             ("target_layer_names",), ("parts", "target_layer_names"), ("rank",)),
        Call("GenerationOptions", kt.GenerationOptions, {}, generation, numbers=(
            "num_beams", "temperature", "top_k", "top_p", "repetition_penalty",
            "no_repeat_ngram_size", "min_new_tokens", "num_return_sequences", "seed",
            "max_time")),
        Call("TextEmbedder", kt.TextEmbedder, {"backbone": tower,
             "preprocessor": plain}, ("pooling", "projection_dim", "normalize",
             "lexical_dim"), numbers=("projection_dim", "lexical_dim")),
        Call("TextEmbedder.compile", embedder.compile, {}, ("gradient_cache_rows",),
             numbers=("gradient_cache_rows",)),
        Call("embed", embedder.embed, {"texts": ["a"]}, ("batch_size", "dimensions"),
             numbers=("batch_size", "dimensions")),
        Call("hidden_states", embedder.hidden_states, {"texts": ["a"]},
             ("layers", "batch_size", "pad_to", "final_norm", "dtype", "as_numpy"),
             numbers=("batch_size", "pad_to")),
        Call("TextEmbedder.fit", of(embedder.fit, **quiet),
             {"x": ["a", "b"], "y": ["c", "d"]}, of_fit,
             ("x", "anchor", "positive"), sizes),
        Call("TextEmbedder.predict", of(embedder.predict, **quiet),
             {"x": {name: v for name, v in ids[0].items() if name[0] == "e"}},
             ("batch_size", "steps"), columns, sizes),
        Call("cosine_similarity", kt.cosine_similarity,
             {"a": np.ones((1, 2)), "b": np.ones((1, 2))}),
        Call("nearest", kt.nearest, {"queries": np.ones((1, 2)),
             "vectors": np.ones((3, 2)), "k": 2}, ("rows_at_once",),
             ("k",), ("k", "rows_at_once")),
        Call("TextClassifier", kt.TextClassifier, {"backbone": tower,
             "preprocessor": plain, "num_classes": 2}, ("class_names", "kind",
             "pooling", "dropout", "separator"), numbers=("dropout", "num_classes")),
        Call("TextClassifier.fit", of(classifier.fit, **quiet), classes, of_fit,
             ("x", "text", "encoder", "second"), sizes),
        Call("TextClassifier.evaluate", of(classifier.evaluate, **quiet), classes,
             ("batch_size", "sample_weight", "steps"), ("text", "encoder"), sizes),
        Call("multi-label fit", of(tagger.fit, **quiet),
             {"x": ["a", "b"], "y": [[0], [1]]}, (), ("x", "text")),
        Call("regression fit", of(regressor.fit, **quiet),
             {"x": ["a", "b"], "y": [0.5, 1.0]}, (), ("x", "text")),
        Call("classify", tagger.classify, {"x": ["a"]}, ("batch_size", "threshold"),
             ("text", "encoder"), sizes),
        Call("TextClassifier.predict", classifier.predict, {"x": ["a"]},
             ("batch_size",), ("text", "encoder"), sizes),
        Call("TextClassifier.train_on_batch", classifier.train_on_batch, classes,
             ("sample_weight",), ("x", "text")),
        Call("TextClassifier.predict_on_batch", classifier.predict_on_batch,
             {"x": ["a", "b"]}, (), ("x", "text")),
        Call("Spans", kt.objectives.Spans, {"mean_length": 3, "rate": 0.5}, ("mode",),
             numbers=("mean_length", "rate")),
        Call("Suffix", kt.objectives.Suffix, {}, ("rate", "mode"), numbers=("rate",)),
        Call("PrefixLM", kt.objectives.PrefixLM, {"split": "half"}),
        Call("UL2", kt.objectives.UL2, {"mixture": "ul2", "sentinels": [9, 8],
             "mode_tokens": {"[NLU]": 5, "[NLG]": 6, "[S2S]": 7}}),
        Call("UL2.from_tokenizer", kt.objectives.UL2.from_tokenizer,
             {"tokenizer": tokenizer}, ("mixture",)),
        Call("an objective", ul2, {"token_ids": [[5, 6, 7]], "seeds": [0]}, ("epoch",),
             ("seeds",), ("epoch",)),
        Call("PairFiles", kt.PairFiles, {"preprocessor": plain, "paths": [rows]},
             ("source", "target", "batch_size", "batching", "steps", "threads"),
             ("rows.jsonl",), ("batch_size", "steps", "threads")),
        Call("TextFiles", kt.TextFiles, {"preprocessor": documents, "paths": rows},
             ("field", "batch_size", "batching", "steps", "threads", "teacher"),
             ("rows.jsonl",), ("batch_size", "steps", "threads")),
        Call("read_pairs", kt.read_pairs, {"path": rows}, ("source", "target"),
             ("rows.jsonl",)),
        Call("read_texts", kt.read_texts, {"path": rows}, ("field",), ("rows.jsonl",)),
        Call("GenerationMetrics", kt.callbacks.GenerationMetrics, {"x": PAIRS},
             ("y", "metrics", "every", "max_rows", "examples", "samples", "prefix",
              "seed"), columns, ("every", "max_rows", "examples", "seed")),
        Call("SaveBest", kt.callbacks.SaveBest, {"folder": folder / "best"},
             ("monitor", "mode")),
        Call("BackupAndRestore", kt.callbacks.BackupAndRestore,
             {"folder": folder / "backup"}, ("save_freq",), numbers=("save_freq",)),
        Call("CrossAttentionWarmUp", kt.callbacks.CrossAttentionWarmUp, {"steps": 5},
             ("norms",), numbers=("steps",)),
        Call("TrainingReport", kt.callbacks.TrainingReport, {"data": data}),
        Call("TokenCrossEntropy", kt.TokenCrossEntropy, {}, ("label_smoothing",
             "z_loss"), numbers=("label_smoothing", "z_loss")),
        Call("InfoNCE", kt.InfoNCE, {}, ("temperature", "dimensions"),
             numbers=("temperature",)),
        Call("Distillation", kt.Distillation, {"teacher": None}, ("temperature",
             "top_k", "label_weight"), numbers=("temperature", "top_k",
             "label_weight")),
        Call("TeacherScores", kt.TeacherScores, {"folder": folder / "no"}),
        Call("score_texts", kt.score_texts, {"predictions": ["a"],
             "references": ["b"], "metrics": "exact_match"}),
        Call("plot_history", kt.plot_history, {"history": history}, ("path",)),
        Call("plan", kt.plan, {"preset": config, "devices": 2, "memory": "1GB",
             "batch": 8, "length": 16}, ("optimizer", "dtype", "lora_rank", "quantize",
             "strategy", "mesh", "rematerialize"),
             numbers=("devices", "memory", "batch", "length", "lora_rank")),
        Call("adapt_gemma2", kt.adapt_gemma2, {"encoder": gemma}, ("decoder", "dtype",
             "cross_attention", "cross_norms", "initializer_std", "seed", "dropout"),
             ("preset",), ("initializer_std", "seed", "dropout")),
        Call("convert", of(kt.convert, overwrite=True), {"preset": preset,
             "folder": folder / "converted"}, ("to", "dtype", "max_shard_size"),
             numbers=("max_shard_size",)),
        Call("verify", kt.verify, {"a": preset, "b": preset}, ("seed",), ("preset",),
             ("seed",)),
        Call("average_presets", of(kt.average_presets, overwrite=True),
             {"presets": [preset, preset], "folder": folder / "mean"}, ("weights",),
             ("preset",)),
        Call("evaluate_encoders", kt.evaluate_encoders, {"tasks": "no", "data": folder,
             "output": folder / "out", "presets": str(preset)}, ("seeds",
             "learning_rates", "epochs", "batch_size", "dropout", "train_rows",
             "pooling", "lexical_dim"), numbers=("seeds", "epochs", "batch_size",
             "dropout", "train_rows", "lexical_dim", "learning_rates")),
        Call("distribute", kt.distribute, {}, ("strategy", "data", "model",
             "devices"), ("JAX",)),
        Call("connect", kt.connect, {"address": "localhost:1", "processes": 2,
             "index": 0}, ("timeout",), ("JAX",)),
        Call("save_to_preset", model.save_to_preset, {"preset_dir": preset}),
        Call("save_to_huggingface", model.save_to_huggingface,
             {"folder": folder / "hf"}, ("dtype", "max_shard_size"),
             numbers=("max_shard_size",)),
        Call("load_lora_weights", model.load_lora_weights, {"filepath": "no.lora.h5"}),
        Call("save_lora_weights", model.save_lora_weights, {"filepath": "no"}),
    ]  # fmt: skip
    return {call.name: call for call in found}

"""Sequence-to-sequence language model: training, generation, scoring."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_t5gemma._compat import track_parameters
from keras_t5gemma.checkpoints import catalog, presets
from keras_t5gemma.checkpoints.preset_saving import AtomicSaveToPreset
from keras_t5gemma.generation import samplers
from keras_t5gemma.generation.generator import Generator, known_tokens
from keras_t5gemma.generation.keras_hub_sampler import decode_batch
from keras_t5gemma.generation.options import options_of_sampler
from keras_t5gemma.generation.requests import answer_mask, read_request, text_lists
from keras_t5gemma.generation.scoring import make_scorer, score
from keras_t5gemma.modeling.backbone import Backbone
from keras_t5gemma.modeling.weight_loading import normal_tensors
from keras_t5gemma.tasks.backbone_changes import ChangesBackbone
from keras_t5gemma.tasks.fit import check_backbone
from keras_t5gemma.tasks.generation_defaults import GenerationDefaults
from keras_t5gemma.tasks.text_pair_task import TextPairTask
from keras_t5gemma.tokenization.compatibility import check_preprocessor
from keras_t5gemma.tokenization.preprocessor import Seq2SeqLMPreprocessor
from keras_t5gemma.training.losses import TokenCrossEntropy
from keras_t5gemma.training.optimizers import prepare_optimizer
from keras_t5gemma.utils.checks import flag, is_auto, shown


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class Seq2SeqLM(GenerationDefaults, ChangesBackbone, AtomicSaveToPreset, TextPairTask):
    """T5Gemma for text-to-text tasks: `fit`, `generate`, `score`.

    Args:
        backbone: a `Backbone`.
        preprocessor: a `Seq2SeqLMPreprocessor`, or `None` to work on arrays of
            ids only.
        *rest: must be empty: what follows is passed by name.
        **kwargs: `name`; `compile`, whether to compile at once; `generation_defaults`,
            keywords of `generate` that hold where a call has none.

    Raises:
        ValueError: for a backbone without a decoder, or when the tokenizer's
            vocabulary is larger than the model's.

    Examples:
        >>> model = keras_t5gemma.Seq2SeqLM.from_preset("t5gemma_mini_synopsis")
        >>> len(model.generate("A chess game.", num_beams=4, num_return_sequences=2))
        2
    """

    backbone_cls = Backbone
    preprocessor_cls = Seq2SeqLMPreprocessor

    def __init__(
        self,
        backbone: Backbone,
        preprocessor: Seq2SeqLMPreprocessor | None = None,
        *rest: Any,
        **kwargs: Any,
    ) -> None:
        check_backbone(type(self), backbone, isinstance(backbone, Backbone), rest)
        if backbone.decoder is None:
            raise ValueError(
                "`backbone` must have a decoder; this one is an encoder alone "
                "(`config.decoder` is None)."
            )
        if preprocessor is not None:
            size = backbone.config.vocabulary_size
            check_preprocessor(preprocessor, type(self).__name__, size)
        defaults = kwargs.pop("generation_defaults", None)
        self.backbone = backbone
        self.preprocessor: Any = preprocessor
        hidden = backbone(backbone.input)["decoder_sequence_output"]
        super().__init__(
            inputs=backbone.input, outputs=backbone.logits(hidden), **kwargs
        )
        track_parameters(self)
        self.generation_defaults = defaults

    @classmethod
    @normal_tensors()
    def from_preset(
        cls, preset: Any, load_weights: bool = True, **kwargs: Any
    ) -> "Seq2SeqLM":
        """Load a preset with its tokenizer and its defaults of `generate`.

        Args:
            preset: a name of `keras_t5gemma.presets()`, a local folder, or an
                `hf://` or `kaggle://` handle; see `Backbone.from_preset`.
            load_weights: `False` leaves the weights random; a published name then
                needs no network, and has no tokenizer unless one is passed.
            **kwargs: `dtype`, `verify_checksums`, `allow_non_finite` (see
                `Backbone.from_preset`), `preprocessor` (a
                `Seq2SeqLMPreprocessor`, or `None`), `name`, `compile`.

        Returns:
            A `Seq2SeqLM`.

        Raises:
            ValueError: for an unknown preset or keyword, or files that do not
                fit, named.
            OSError: when a download fails, with what to do.
        """
        preset = presets.take_location(preset, kwargs)
        of_backbone = ("dtype", "verify_checksums", "allow_non_finite")
        known = (*of_backbone, "preprocessor", "name", "compile")
        presets.check_keywords(kwargs, known, cls.__name__)
        flag(load_weights, "load_weights")
        is_offline = not load_weights and catalog.published_config(preset) is not None
        source = preset if is_offline else presets.resolve(preset)
        options = {name: kwargs.pop(name) for name in of_backbone if name in kwargs}
        backbone = Backbone.from_preset(source, load_weights, **options)
        if "preprocessor" not in kwargs and not is_offline:
            kwargs["preprocessor"] = Seq2SeqLMPreprocessor.from_preset(source)
        model = cls(backbone, **kwargs)
        if not is_offline:
            model.read_generation_defaults(source)
        return model

    def save_to_huggingface(
        self, folder: Any, dtype: str | None = None, max_shard_size: Any = 5
    ) -> None:
        """Save a folder that transformers loads, with the tokenizer.

        Args:
            folder: path; an earlier checkpoint in it is replaced, all or nothing.
            dtype: to round the weights to; see `Backbone.save_to_huggingface`.
            max_shard_size: of the largest weight file: a number of GB, or a size with
                a unit, e.g. `"500MB"`.

        Raises:
            ValueError: see `Backbone.save_to_huggingface`.
        """
        kwargs = {"preprocessor": self.preprocessor}
        kwargs["generation_defaults"] = self.generation_defaults
        self.backbone.save_to_huggingface(folder, dtype, max_shard_size, **kwargs)

    def compile(
        self,
        optimizer: Any = "auto",
        loss: Any = "auto",
        *,
        weighted_metrics: Any = "auto",
        sampler: Any = "auto",
        rematerialize: bool = False,
        **kwargs: Any,
    ) -> None:
        """Configure training and generation.

        Args:
            optimizer: `"auto"` is Adafactor at 1e-4, as in the official fine-tuning
                example; it needs little memory and works with bfloat16 weights. For
                `gradient_accumulation_steps` see `fit`.
            loss: `"auto"` is `TokenCrossEntropy()`; with the default metrics and no
                `loss_weights`, and as a `Distillation`, it is computed in chunks. The
                mean of all losses is over the target tokens, without padding.
            weighted_metrics: `"auto"` is the accuracy of the next token, and
                perplexity if the loss is computed in chunks.
            sampler: for `generate`: `"auto"` is `generation_defaults`, or greedy;
                `"greedy"`, `"beam"`, `"random"`, `"top_k"`, `"top_p"`, or a sampler.
            rematerialize: keep only the input of each block for the backward pass and
                recompute the rest: less memory, more time.
            **kwargs: further arguments of `keras.Model.compile`. On PyTorch
                `jit_compile=True` compiles the decoding step, half a minute at the
                first token of a new batch size, then faster, and nothing else.

        Raises:
            ValueError: for an unknown sampler, or an optimizer not for this dtype.
        """
        rematerialize = flag(rematerialize, "rematerialize")
        is_auto_sampler = is_auto(sampler)
        sampler = samplers.get("greedy" if is_auto_sampler else sampler)
        super().compile(
            optimizer=prepare_optimizer(optimizer, self.backbone.variable_dtype),
            loss=TokenCrossEntropy() if is_auto(loss) else loss,
            weighted_metrics=weighted_metrics,
            **kwargs,
        )
        self.sampler, self.is_auto_sampler = sampler, is_auto_sampler
        self.generate_function = None
        for tower in (self.backbone.encoder, self.backbone.decoder):
            tower.rematerialize = rematerialize

    @property
    def sampler_options(self) -> dict | None:
        """The `GenerationOptions` of `compile(sampler=...)`, as a dict.

        `None` for a sampler that runs in KerasHub's code.
        """
        return options_of_sampler(self.sampler)

    def get_compile_config(self) -> dict | None:
        config = super().get_compile_config()
        if config:  # It is compiled.
            sampler = samplers.serialize(self.sampler)
            config["sampler"] = "auto" if self.is_auto_sampler else sampler
        return config

    def _compile_arguments(self, config):
        return {"sampler": config.pop("sampler"), **super()._compile_arguments(config)}

    def generate(
        self,
        inputs: Any,
        max_length: int | None = None,
        stop_token_ids: Any = "auto",
        strip_prompt: bool = False,
        batch_size: int = 32,
        **options: Any,
    ) -> Any:
        """Generate an answer to each source.

        Args:
            inputs: a source string, a list of them (any container of `to_list`), a dict
                of `"encoder_text"` and (optional) `"decoder_text"` to continue, strings
                or lists, where one source with a list of prompts is encoded only once;
                or a dict of int arrays: `encoder_token_ids` `(batch, length)` and,
                optionally, `encoder_padding_mask`, `decoder_token_ids` (start token and
                prompt) and `decoder_padding_mask`.
            max_length: maximum number of decoder tokens, with start token and prompt;
                `None` means the preprocessor's `decoder_sequence_length`.
            stop_token_ids: ids that end an answer; `"auto"` is eos and
                `<end_of_turn>`, `None` generates until `max_length`.
            strip_prompt: return answers without `decoder_text`.
            batch_size: maximum number of sources in a batch, for sources above 512
                tokens also of `batch_size` x 512 tokens; sources of similar length
                share a batch, and results keep the input order.
            **options: those of `GenerationOptions`, e.g. `top_p`, `num_beams`, `seed`,
                `speculate="source"`, `draft=small_model`; they override the sampler of
                `compile` and the checkpoint's `generation_defaults`.

        Returns:
            A string for a string, a list for a list (`[]` for `[]`); for arrays
            a dict of int32 `decoder_token_ids` and `decoder_padding_mask`,
            `(batch, max_length)`. An empty source `""` is allowed: the decoder
            then generates unconditionally. With `num_return_sequences` above 1 each
            answer is a list of answers, and arrays are `(batch, answers, max_length)`.
            With `return_scores` a dict of `"text"` (not for arrays), `"log_prob"`,
            `"token_log_probs"` and `"token_ids"` of the answers, as in `score`.

        Raises:
            ValueError: for other inputs, ids outside the vocabulary, a prompt longer
                than `max_length`, a `max_length` beyond the model's positions, or
                options that do not fit.
        """
        if self.preprocessor is not None:
            inputs = text_lists(inputs)
        is_arrays = isinstance(inputs, dict) and "encoder_token_ids" in inputs
        first = inputs
        if isinstance(inputs, dict):
            texts = [inputs.get("encoder_text"), inputs.get("decoder_text")]
            first = next((t for t in texts if not isinstance(t, str | None)), texts[0])
        nothing = isinstance(first, list | tuple) and not first
        max_length, stop_token_ids, options = self._with_defaults(
            max_length, stop_token_ids, options
        )
        strip_prompt = flag(strip_prompt, "strip_prompt")
        request = read_request(
            [""] if nothing else inputs,
            self.preprocessor,
            self.backbone.config,
            max_length,
            stop_token_ids,
            batch_size,
        )
        checked = self._generator().options(options, request)
        if nothing:
            return []
        ids, log_probs, ends = self._generator().decode(request, checked, batch_size)
        answers = 1 if checked is None else checked.num_return_sequences
        lengths = np.repeat(request.prompt_lengths, answers)
        mask = answer_mask(ids, lengths, ends, request.stop_ids)
        written = (mask * (np.arange(ids.shape[1]) >= lengths[:, None])).astype(bool)

        def nest(rows):
            if answers > 1:
                rows = [rows[i : i + answers] for i in range(0, len(rows), answers)]
            return rows[0] if isinstance(first, str) else rows

        result: dict[str, Any] = {}
        if checked is not None and checked.return_scores:
            chosen = [p[w] for p, w in zip(log_probs, written, strict=True)]
            result["log_prob"] = nest([float(p.sum(dtype="float64")) for p in chosen])
            result["token_log_probs"] = nest(chosen)
            result["token_ids"] = nest(
                [i[w] for i, w in zip(ids, written, strict=True)]
            )
        if is_arrays:
            shape = ids.shape if answers == 1 else (-1, answers, ids.shape[1])
            result["decoder_token_ids"] = (ids * mask).reshape(shape)
            result["decoder_padding_mask"] = mask.reshape(shape)
            return result
        shown = written.astype("int32") if strip_prompt else mask
        answer = {"decoder_token_ids": ids, "decoder_padding_mask": shown}
        texts = nest(self.preprocessor.generate_postprocess(answer))
        return {"text": texts, **result} if result else texts

    def stream(
        self,
        text: Any,
        max_length: int | None = None,
        stop_token_ids: Any = "auto",
        **options: Any,
    ) -> Iterator[str]:
        """Generate an answer and yield its text piece by piece.

        Args:
            text: a source string, or a dict of `"encoder_text"` and (optional)
                `"decoder_text"` to continue, strings.
            max_length: see `generate`.
            stop_token_ids: see `generate`.
            **options: see `generate`; no beams, one answer.

        Yields:
            Strings; joined they equal `generate(..., strip_prompt=True)`. A character
            of several tokens is yielded when it is complete.

        Raises:
            ValueError: see `generate`; or for beam search.
        """
        parts = list(text.values()) if isinstance(text, dict) else [text]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(
                f"`text` must be one string, or a dict of strings; got {shown(text)}."
            )
        max_length, stop_token_ids, options = self._with_defaults(
            max_length, stop_token_ids, options
        )
        request = read_request(
            text, self.preprocessor, self.backbone.config, max_length, stop_token_ids, 1
        )
        checked = self._generator().options(options, request)
        if checked is None or checked.rows_per_source > 1 or checked.return_scores:
            raise ValueError(
                "`stream` needs greedy decoding or sampling, with one answer: "
                "`num_beams`, `num_return_sequences` and `return_scores` must have "
                f"their defaults; got {shown(checked or self.sampler)}."
            )
        return self._generator().stream(request, checked)

    def _generator(self):
        if self.__dict__.get("_decoder") is None:
            # Bypasses Keras's tracking: it owns no weights and is not saved.
            object.__setattr__(self, "_decoder", Generator(self))
        return self._decoder

    def compiled_programs(self) -> int:
        """Count the compiled programs.

        Returns:
            How many `generate` and `stream` have compiled so far.
        """
        return self._generator().compiled_programs()

    def generate_step(self, inputs: dict, stop_token_ids: Any = None) -> Any:
        """One compiled batch; KerasHub's `make_generate_function` wraps it.

        Args:
            inputs: dict of arrays, see `decoding.start`.
            stop_token_ids: ids that end an answer, or `None`.

        Returns:
            int32 `(batch, max length)`; 0 after the first stop id of a row.
        """
        known = known_tokens(self)
        return decode_batch(
            self.backbone, self.sampler, inputs, stop_token_ids, self, known
        )

    def score(self, source: Any, target: Any, batch_size: int = 32) -> dict[str, Any]:
        """Log-probability of each target given its source.

        Args:
            source: a string, or a list of them.
            target: a string, or a list of the same length.
            batch_size: maximum number of pairs in a batch, as in `generate`.

        Returns:
            A dict of `"log_prob"` (natural log of the whole target and its end
            token), `"token_log_probs"` and `"token_ids"` (float32 and int32
            `(tokens,)`, the end token last); lists of those for lists. Longer texts
            than the preprocessor's lengths are truncated.

        Raises:
            ValueError: without a preprocessor, or for values that are not strings.
        """
        if self.preprocessor is None:
            raise ValueError("`score` needs a preprocessor: it works on text.")
        pairs = text_lists({"encoder_text": source, "decoder_text": target})
        if list(pairs.values()) == [[], []]:
            return {"log_prob": [], "token_log_probs": [], "token_ids": []}
        if self.__dict__.get("_scorer") is None:
            # Bypasses Keras's tracking: it owns no weights and is not saved.
            object.__setattr__(self, "_scorer", make_scorer(self))
        reader = self.preprocessor.for_reading(self.backbone.config.max_positions)
        result = score(self._scorer, reader, pairs, batch_size)
        single = isinstance(source, str)
        return {k: v[0] for k, v in result.items()} if single else result

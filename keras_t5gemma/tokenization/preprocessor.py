"""Preprocessor: text pairs to padded arrays for training and generation."""

import contextlib
import inspect
import os
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_t5gemma.checkpoints import preset_saving, presets
from keras_t5gemma.config import T5GemmaConfig
from keras_t5gemma.modeling import bases
from keras_t5gemma.modeling.backbone import Backbone
from keras_t5gemma.tokenization import chat_template, tokenizer_files
from keras_t5gemma.tokenization.chat_template import TEMPLATES
from keras_t5gemma.tokenization.compatibility import check_objective
from keras_t5gemma.tokenization.token_ids import (
    id_array,
    named,
    pad,
    padded_width,
    pair_arrays,
)
from keras_t5gemma.tokenization.tokenizer import Tokenizer
from keras_t5gemma.tokenization.truncation import CountsTruncation
from keras_t5gemma.utils.buckets import SHORT
from keras_t5gemma.utils.checks import (
    instance,
    json_object,
    row_weights,
    shown,
    string,
    whole_number,
)
from keras_t5gemma.utils.files import named_values
from keras_t5gemma.utils.texts import as_texts, check_unicode, text_pairs

TokenRows = list[list[int]]


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class Seq2SeqLMPreprocessor(CountsTruncation, bases.Preprocessor):
    """Preprocess pairs of texts to `(x, y, sample_weight)`, and texts to prompts.

    The encoder input is the text without bos or eos, the same in training and in
    generation. The decoder input is bos + response, its target response + end token;
    padding is on the right with id 0 and weight 0.

    Args:
        tokenizer: a `Tokenizer`.
        encoder_sequence_length: maximum length of the encoder input, in tokens; longer
            texts are truncated. `None` is 512 in training, and the positions of the
            model (`config.max_positions`) in `generate`, `score`, `embed`, `classify`.
        decoder_sequence_length: maximum length of the decoder input, in tokens, with
            bos; longer texts are truncated.
        template: `None` for plain text, `"instruction"` for the turns of the
            instruction-tuned checkpoints, or a string with one `{text}`. Control tokens
            of the template become single ids, those in the user's text do not. With a
            template the response ends in `<end_of_turn>`, otherwise in `<eos>`.
        pad_to_multiple_of: `None` pads every batch to the full lengths, which `fit` may
            cut, see its `batching`; n pads it to its longest row, rounded up to a
            multiple of n (less padding, more compiled shapes on JAX and TensorFlow).
        objective: an `objectives.PrefixLM` or `UL2`, which makes the pairs from plain
            text for continued pretraining: `fit` then takes texts. It is not saved with
            the preset, which is used and fine-tuned without it.
        **kwargs: `name`.

    Raises:
        ValueError: for a length below 1, a template without `{text}`, or lengths that
            are too short for the objective.

    Examples:
        >>> preprocessor = keras_t5gemma.Seq2SeqLMPreprocessor.from_preset(
        ...     "t5gemma_mini", encoder_sequence_length=16, decoder_sequence_length=8
        ... )
        >>> x, y, weights = preprocessor(
        ...     {"encoder_text": ["A game of chess."], "decoder_text": ["chess game"]}
        ... )
        >>> x["encoder_token_ids"].shape, y.shape, weights.shape
        ((1, 16), (1, 8), (1, 8))
    """

    backbone_cls = Backbone
    tokenizer_cls = Tokenizer

    def __init__(
        self,
        tokenizer: Tokenizer,
        encoder_sequence_length: int | None = None,
        decoder_sequence_length: int = 512,
        template: str | None = None,
        pad_to_multiple_of: int | None = None,
        objective: Any = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.built = True
        whole_number(decoder_sequence_length, "decoder_sequence_length", 2)
        instance(tokenizer, "tokenizer", Tokenizer, "a keras_t5gemma.Tokenizer")
        if pad_to_multiple_of is not None:
            whole_number(pad_to_multiple_of, "pad_to_multiple_of", 1, other="None")
        if template is not None:
            is_text = isinstance(template, str)
            if not is_text or TEMPLATES.get(template, template).count("{text}") != 1:
                raise ValueError(
                    f"`template` must be None, one of {sorted(TEMPLATES)}, or a "
                    f"string with one '{{text}}'; got {shown(template)}."
                )
            check_unicode(template, "`template`")
        self.tokenizer = tokenizer
        self.encoder_sequence_length = encoder_sequence_length
        self.decoder_sequence_length = decoder_sequence_length
        self.template = template
        self.pad_to_multiple_of = pad_to_multiple_of
        self.objective = objective

    @property
    def objective(self) -> Any:
        """The objective that makes pairs from plain text, or `None`."""
        return self._objective

    @objective.setter
    def objective(self, objective: Any) -> None:
        self._objective = objective
        if objective is None:
            return
        try:
            check_objective(self)
        except ValueError:
            self._objective = None
            raise

    def longest_text(self) -> int:
        """Longest text whose pairs always fit the lengths; only with an `objective`.

        Returns:
            A number of tokens.
        """
        return self.objective.longest_text(
            self.encoder_sequence_length,
            self.decoder_sequence_length - 1,  # The end token.
        )

    def call(self, x: Any, y: None = None, sample_weight: Any = None) -> tuple:
        """Training arrays of a batch of pairs.

        Args:
            x: dict with `"encoder_text"` and `"decoder_text"`, each a list of
                strings (or one string: a batch of one). With an objective a list of
                texts, or `{"text": [...]}`; its random choices depend on the text.
            y: must be `None`: the target is the decoder text.
            sample_weight: `None`, or one weight for each pair, `(batch,)`.

        Returns:
            `(x, y, sample_weight)`: dict of the backbone's int32 inputs; int32 targets
            `(batch, decoder length)`; float32 weights of that shape, 0 on padding.

        Raises:
            ValueError: for wrong keys, unequal lengths, or values that are not text.
        """
        if y is not None:
            raise ValueError(
                "`y` must be None: the target is x['decoder_text'], shifted."
            )
        sources, rows = self.token_rows(x)
        multiple = self.pad_to_multiple_of
        width = padded_width(sources, self.encoder_sequence_length, multiple)
        target_width = padded_width(rows, self.decoder_sequence_length, multiple)
        start_id = self.tokenizer.start_token_id
        x, labels, mask = pair_arrays(sources, rows, start_id, width, target_width)
        weights = mask.astype("float32")
        if sample_weight is not None:
            by_row = row_weights(sample_weight, "sample_weight", len(rows))
            weights *= by_row[:, None]
        return x, labels, weights

    def token_rows(self, x: Any) -> tuple[TokenRows, TokenRows]:
        """Ids of pairs, truncated to the lengths, not padded.

        Args:
            x: as in `call`.

        Returns:
            `(sources, targets)`, a list of ids for each row. A target ends in the end
            token, unless it was truncated.

        Raises:
            ValueError: as in `call`.
        """
        if self.objective is not None:
            texts = x["text"] if isinstance(x, dict) and set(x) == {"text"} else x
            texts = as_texts([texts] if isinstance(texts, str) else texts, "x")
            with self.report_truncation():
                rows = self.tokenizer.tokenize(texts)
                longest = self.longest_text()
                self.count("text", sum(len(row) > longest for row in rows), len(rows))
                return self.objective.pairs(self, rows)
        sources, targets = text_pairs(x)
        with self.report_truncation():
            rows = [ids + [self.end_id] for ids in self.tokenizer.tokenize(targets)]
            self.count_empty(sources=sources, targets=targets)
            rows = self._truncate(rows, self.decoder_sequence_length, "decoder")
            return self.encoder_rows(sources), rows

    def generate_preprocess(
        self, x: Any, sequence_length: int | None = None
    ) -> dict[str, np.ndarray]:
        """Arrays of a batch of sources, optionally with prompts for the decoder.

        Args:
            x: a string, a list of strings, or a dict of `"encoder_text"` and
                optionally `"decoder_text"` to continue.
            sequence_length: maximum number of decoder tokens, bos and prompt included;
                `None` is `decoder_sequence_length`.

        Returns:
            The dict of the backbone's int32 inputs: the encoder arrays are padded to a
            multiple of 64, the decoder arrays hold bos and the prompt and are `(batch,
            sequence_length)`.

        Raises:
            ValueError: for other values, or a prompt longer than `sequence_length`.
        """
        if sequence_length is None:
            sequence_length = self.decoder_sequence_length
        whole_number(sequence_length, "sequence_length", 1)
        if not isinstance(x, dict):
            x = {"encoder_text": x}
        sources, prompts = text_pairs(x, decoder_optional=True)
        # Alone it has no model: 8,192 positions, as in all published checkpoints.
        reader = self.for_reading(T5GemmaConfig.max_positions)
        with reader.report_truncation():
            encoder = reader.encoder_rows(sources)
        multiple = self.pad_to_multiple_of or 64
        width = padded_width(encoder, reader.encoder_sequence_length, multiple)
        start = self.tokenizer.start_token_id
        rows = [[start, *ids] for ids in self.tokenizer.tokenize(prompts)]
        longest = max(map(len, rows), default=1)
        if longest > sequence_length:
            raise ValueError(
                f"`decoder_text` is {longest} tokens with bos, more than the "
                f"`max_length` of {sequence_length}."
            )
        decoder = named("decoder", *pad(rows, sequence_length))
        return named("encoder", *pad(encoder, width)) | decoder

    def generate_postprocess(self, x: dict[str, Any]) -> list[str]:
        """Texts of generated ids.

        Args:
            x: dict of int arrays `decoder_token_ids` and `decoder_padding_mask`,
                `(batch, length)`.

        Returns:
            A list of strings, of the ids where the mask is not 0.

        Raises:
            ValueError: for other values, or ids outside the vocabulary.
        """
        names = ("decoder_token_ids", "decoder_padding_mask")
        if not isinstance(x, dict) or not set(names) <= set(x):
            raise ValueError(f"`x` must be a dict of {names}; got {shown(x)}.")
        ids, mask = (id_array(x[name], f"x[{name!r}]") for name in names)
        rows = zip(ids, mask.astype(bool), strict=True)
        return [self.tokenizer.detokenize(row[keep].tolist()) for row, keep in rows]

    @classmethod
    def from_preset(
        cls, preset: presets.PresetLike, **kwargs: Any
    ) -> "Seq2SeqLMPreprocessor":
        """Load the preprocessor of a preset.

        KerasHub's presets hold the lengths, of which its default of 512 encoder tokens
        is not taken for a choice. In both formats a chat template of Gemma's turns or
        the exact name of a published instruction-tuned checkpoint gives the template.

        Args:
            preset: name, folder or handle; see `Backbone.from_preset`.
            **kwargs: arguments of the class, which replace the saved ones.

        Returns:
            A preprocessor of this class.

        Raises:
            ValueError: for an unknown preset or keyword, or a missing tokenizer.
            OSError: when a download fails, with instructions.
        """
        preset = presets.take_location(preset, kwargs)
        known = inspect.signature(cls.__init__).parameters
        presets.check_keywords(kwargs, set(known) - {"self", "kwargs"}, cls.__name__)
        source = presets.resolve(preset)
        saved = {}
        if source.format != presets.HUGGING_FACE:
            saved = source.read_json("preprocessor.json", default={})
        given, file = set(kwargs), f"{source.location}: preprocessor.json"
        with named_values(file):
            config = json_object(saved.get("config", {}), "config")
            registered = saved.get("registered_name")
            if registered is not None:
                string(registered, "registered_name")
        if source.format == presets.KERAS:
            saved_cls = keras.saving.get_registered_object(registered)
            if isinstance(saved_cls, type) and issubclass(saved_cls, cls):
                cls, kwargs = saved_cls, {**config, **kwargs}
        else:
            if "template" not in kwargs:
                kwargs["template"] = chat_template.template_of(source)
            for side in ("encoder", "decoder"):
                name = f"{side}_sequence_length"
                is_default = side == "encoder" and config.get(name) == SHORT
                if config.get(name) and not is_default:
                    kwargs.setdefault(name, config[name])
        if "tokenizer" not in kwargs:
            kwargs["tokenizer"] = Tokenizer.from_preset(source)
        elif isinstance(kwargs["tokenizer"], dict):  # As it was saved.
            with named_values(file):
                tokenizer: Any = keras.layers.deserialize(kwargs["tokenizer"])
                instance(tokenizer, "tokenizer", Tokenizer, "a serialized Tokenizer")
            tokenizer_files.read(source)  # Checks the file.
            tokenizer.load_assets(os.path.dirname(source.tokenizer_file()))
            kwargs["tokenizer"] = tokenizer
        # What the caller has passed is not the file's fault.
        with contextlib.nullcontext() if given else named_values(file):
            return cls.from_config(kwargs)

    @property
    def end_id(self) -> int:
        """The id that ends a response in training."""
        if self.template is None:
            return self.tokenizer.end_token_id
        return self.tokenizer.end_of_turn_id

    @property
    def stop_ids(self) -> tuple[int, int]:
        """The ids that end a generated response."""
        return (self.tokenizer.end_token_id, self.tokenizer.end_of_turn_id)

    def chat_template(self) -> str | None:
        """The template in the language of transformers.

        Returns:
            A chat template; `None` for plain text.
        """
        return chat_template.write(self.template)

    def encoder_rows(
        self, texts: Sequence[str], pad_to: int | None = None
    ) -> TokenRows:
        """Ids of the encoder input of each text, in the template and truncated.

        Only in the context of `report_truncation`, which counts truncated texts.

        Args:
            texts: a list of strings.
            pad_to: maximum number of tokens; `None` is `encoder_sequence_length`.

        Returns:
            A list of ids for each text.

        Raises:
            ValueError: when the template leaves no room for text.
        """
        length = pad_to or self.encoder_sequence_length
        rows = self.tokenizer.tokenize(texts)
        if self.template is None:
            return self._truncate(rows, length, "encoder")
        template = TEMPLATES.get(self.template, self.template)
        before, after = (
            self.tokenizer.tokenize(part, parse_control_tokens=True)
            for part in template.split("{text}")
        )
        room = length - len(before) - len(after)
        if room < 1:
            name = "pad_to" if pad_to else "encoder_sequence_length"
            raise ValueError(
                f"`{name}` {length} leaves no room for text: the template has "
                f"{length - room} tokens."
            )
        # The text is truncated, never the template around it.
        rows = self._truncate(rows, room, "encoder")
        return [before + row + after for row in rows]

    def save_to_preset(self, preset_dir: str | os.PathLike[str]) -> None:
        """Write the preprocessor's and the tokenizer's files into a preset's folder.

        Args:
            preset_dir: path of the folder.
        """
        preset_saving.save_preprocessor(self, preset_dir)

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "encoder_sequence_length": self._encoder_length,
            "decoder_sequence_length": self.decoder_sequence_length,
            "template": self.template,
            "pad_to_multiple_of": self.pad_to_multiple_of,
        }

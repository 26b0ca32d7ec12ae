"""Text pairs to padded arrays for training, texts to arrays for generation."""

import contextlib
import inspect
import os
import warnings

import keras
import keras_hub
import numpy as np

from keras_t5gemma.checkpoints import presets
from keras_t5gemma.modeling.backbone import Backbone
from keras_t5gemma.tokenization.tokenizer import Tokenizer, as_texts
from keras_t5gemma.utils import buckets
from keras_t5gemma.utils.checks import whole_number

INSTRUCTION_TEMPLATE = (
    "<start_of_turn>user\n{text}<end_of_turn>\n<start_of_turn>model\n"
)
TEMPLATES = {"instruction": INSTRUCTION_TEMPLATE}


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class Seq2SeqLMPreprocessor(keras_hub.models.Preprocessor):
    """Pairs of texts to `(x, y, sample_weight)`; texts to prompts.

    The encoder gets the text, without bos or eos, the same in training and in
    generation. The decoder input is bos + response, its target response + end
    token; padding is on the right with id 0 and weighs nothing.

    Args:
        tokenizer: a `Tokenizer`.
        encoder_sequence_length: longest encoder input, in tokens; more is cut.
        decoder_sequence_length: longest decoder sequence, in tokens, bos
            included; more is cut.
        template: `None` for plain text, `"instruction"` for the turns of the
            instruction-tuned checkpoints, or a string with one `{text}`. A
            template's control tokens become single ids; the user's text never
            does. With a template the response ends in `<end_of_turn>`,
            otherwise in `<eos>`.
        pad_to_multiple_of: `None` pads every batch to the full lengths; n pads
            it to its longest row, rounded up to a multiple of n (fewer wasted
            tokens, more compiled shapes on JAX and TensorFlow).
        objective: an `objectives.PrefixLM` or `UL2` makes the pairs, out of plain
            text: `fit` takes texts then, and adapts. It is not saved with the
            rest: a preset is used, and fine-tuned, without it.

    Raises:
        ValueError: for a length below 1, a template without `{text}`, or lengths
            that leave no room for the objective's pairs.
    """

    backbone_cls = Backbone
    tokenizer_cls = Tokenizer

    def __init__(
        self,
        tokenizer,
        encoder_sequence_length=512,
        decoder_sequence_length=512,
        template=None,
        pad_to_multiple_of=None,
        objective=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.built = True
        for name, value, least in (
            ("encoder_sequence_length", encoder_sequence_length, 1),
            ("decoder_sequence_length", decoder_sequence_length, 2),
            ("pad_to_multiple_of", pad_to_multiple_of or 1, 1),
        ):
            whole_number(value, name, least)
        if template is not None:
            text = TEMPLATES.get(template, template)
            if not isinstance(text, str) or text.count("{text}") != 1:
                raise ValueError(
                    f"`template` must be None, one of {sorted(TEMPLATES)}, or a "
                    f"string with one '{{text}}'; got {template!r}."
                )
        self.tokenizer = tokenizer
        self.encoder_sequence_length = encoder_sequence_length
        self.decoder_sequence_length = decoder_sequence_length
        self.template = template
        self.pad_to_multiple_of = pad_to_multiple_of
        self.objective = objective
        self._counts = None

    @property
    def objective(self):
        """What makes pairs out of plain text, or `None`."""
        return self._objective

    @objective.setter
    def objective(self, objective):
        self._objective = objective
        if objective is None:
            return
        try:
            _check_objective(self)
        except ValueError:
            self._objective = None
            raise

    def longest_text(self):
        """Maximum number of tokens of a text whose pairs fit, whatever is drawn.

        Only with an `objective`.
        """
        return self.objective.longest_text(
            self.encoder_sequence_length,
            self.decoder_sequence_length - 1,  # The end token.
        )

    def call(self, x, y=None, sample_weight=None):
        """Training arrays of a batch of pairs.

        Args:
            x: dict with `"encoder_text"` and `"decoder_text"`, each a list of
                strings (or one string: a batch of one). With an objective a list of
                texts, or `{"text": [...]}`; what is drawn comes from the text.
            y: must be `None`: the target is the decoder text.
            sample_weight: `None`, or one weight a pair, `(batch,)`.

        Returns:
            `(x, y, sample_weight)`: the dict of the backbone's int32 inputs,
            int32 targets `(batch, decoder length)` and float32 weights of the
            same shape, 0 on padding.

        Raises:
            ValueError: for wrong keys, lengths that differ, or what is no text.
        """
        if y is not None:
            raise ValueError(
                "`y` must be None: the target is x['decoder_text'], shifted."
            )
        sources, rows = self.token_rows(x)
        multiple = self.pad_to_multiple_of
        width = round_up(rows, self.decoder_sequence_length, multiple)
        encoder = self._encoder_arrays(sources, multiple)
        labels, mask = pad(rows, width)
        inputs = [[self.tokenizer.start_token_id, *row[:-1]] for row in rows]
        decoder_ids, _ = pad(inputs, width)
        weights = mask.astype("float32")
        if sample_weight is not None:
            weights *= np.asarray(sample_weight, "float32").reshape(-1, 1)
        x = {**encoder, **named("decoder", decoder_ids, mask)}
        return x, labels, weights

    def token_rows(self, x):
        """Ids of pairs, cut to the lengths, not padded.

        Args:
            x: as in `call`.

        Returns:
            `(sources, targets)`, a list of ids each row. A target ends in the end
            token, unless it was cut.

        Raises:
            ValueError: as in `call`.
        """
        if self.objective is not None:
            with self.report_truncation():
                rows = self.tokenizer.tokenize(_texts(x))
                longest = self.longest_text()
                self.count("text", sum(len(row) > longest for row in rows), len(rows))
                return self.objective.pairs(self, rows)
        sources, targets = self._pair(x)
        with self.report_truncation():
            rows = [ids + [self.end_id] for ids in self.tokenizer.tokenize(targets)]
            self.count("empty", sum(len(row) == 1 for row in rows), len(rows))
            rows = self._cut(rows, self.decoder_sequence_length, "decoder")
            return self.encoder_rows(sources), rows

    def generate_preprocess(self, x, sequence_length=None):
        """Arrays of a batch of sources, with a start of the answer or without.

        Args:
            x: a string, a list of strings, or a dict of `"encoder_text"` and,
                as an option, `"decoder_text"` to continue.
            sequence_length: most decoder tokens, bos and prompt included;
                `None` means `decoder_sequence_length`.

        Returns:
            The dict of the backbone's int32 inputs: the encoder arrays are
            padded to a multiple of 64, the decoder arrays hold bos and the
            prompt and are `(batch, sequence_length)`.
        """
        sequence_length = sequence_length or self.decoder_sequence_length
        if not isinstance(x, dict):
            x = {"encoder_text": x}
        sources, prompts = self._pair(x, decoder_optional=True)
        with self.report_truncation():
            encoder = self.encoder_rows(sources)
        encoder = self._encoder_arrays(encoder, self.pad_to_multiple_of or 64)
        rows = [
            [self.tokenizer.start_token_id, *ids]
            for ids in self.tokenizer.tokenize(prompts)
        ]
        longest = max(map(len, rows), default=1)
        if longest > sequence_length:
            raise ValueError(
                f"`decoder_text` is {longest} tokens with bos, more than the "
                f"`max_length` of {sequence_length}."
            )
        return {**encoder, **named("decoder", *pad(rows, sequence_length))}

    def generate_postprocess(self, x):
        """Strings of a dict of generated `decoder_token_ids` and mask."""
        ids = np.asarray(x["decoder_token_ids"])
        mask = np.asarray(x["decoder_padding_mask"]).astype(bool)
        rows = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
        return [self.tokenizer.detokenize(row) for row in rows]

    @classmethod
    def from_preset(cls, preset, **kwargs):
        """The preprocessor of a preset, with any of its arguments replaced.

        KerasHub's gives the lengths. A transformers folder has none: the defaults
        are taken. For both, the instruction template when the name ends in `-it`.
        """
        known = inspect.signature(cls.__init__).parameters
        presets.check_keywords(kwargs, set(known) - {"self", "kwargs"}, cls.__name__)
        source = presets.resolve(preset)
        saved = {}
        if source.format != presets.HUGGING_FACE:
            saved = source.read_json("preprocessor.json", default={})
        config = saved.get("config", {})
        if source.format == presets.KERAS:
            saved_cls = keras.saving.get_registered_object(saved.get("registered_name"))
            if saved and issubclass(saved_cls or object, cls):
                cls, kwargs = saved_cls, {**config, **kwargs}
        else:
            if source.is_instruction_tuned:
                kwargs.setdefault("template", "instruction")
            for side in ("encoder", "decoder"):
                name = f"{side}_sequence_length"
                if config.get(name):
                    kwargs.setdefault(name, config[name])
        tokenizer = kwargs.get("tokenizer")
        if not isinstance(tokenizer, Tokenizer):  # None, or its saved configuration.
            file = source.tokenizer_file()
            if isinstance(tokenizer, dict):
                kwargs["tokenizer"] = keras.layers.deserialize(tokenizer)
                kwargs["tokenizer"].load_assets(os.path.dirname(file))
            else:
                kwargs["tokenizer"] = Tokenizer(file)
        return cls.from_config(kwargs)

    @property
    def end_id(self):
        """The id that ends a response in training."""
        if self.template is None:
            return self.tokenizer.end_token_id
        return self.tokenizer.end_of_turn_id

    @property
    def stop_ids(self):
        """The ids that end a generated response, either of them."""
        return (self.tokenizer.end_token_id, self.tokenizer.end_of_turn_id)

    @contextlib.contextmanager
    def report_truncation(self, empty_targets=False):
        """Warn once, with counts, about all that was cut inside this context.

        Args:
            empty_targets: warn about pairs without a target too.
        """
        if self._counts is not None:  # An outer one reports.
            yield
            return
        self._counts = {}
        try:
            yield
        finally:
            counts, self._counts = self._counts, None
            empty, total = counts.pop("empty", (0, 0))
            if empty and empty_targets:
                warnings.warn(
                    f"{empty} of {total} targets are empty: they teach the model to "
                    "answer nothing. Leave such pairs out if that is not meant.",
                    stacklevel=3,
                )
            cut, total = counts.pop("text", (0, 0))
            if cut:
                longest = self.longest_text()
                warnings.warn(
                    f"{cut} of {total} texts were longer than {longest} tokens "
                    "and were cut. In memory, `fit` takes all their pieces.",
                    stacklevel=3,
                )
            for side, (cut, total) in counts.items():
                if cut:
                    name = f"{side}_sequence_length"
                    warnings.warn(
                        f"{cut} of {total} {side} texts were longer than "
                        f"{getattr(self, name)} tokens and were cut; raise "
                        f"`preprocessor.{name}` to keep them whole.",
                        stacklevel=3,
                    )

    def _pair(self, x, decoder_optional=False):
        known = ("encoder_text", "decoder_text")
        if not isinstance(x, dict):
            raise ValueError(
                f"Text pairs must be a dict with keys {known}; got {type(x).__name__}."
            )
        required = known[:1] if decoder_optional else known
        if set(x) - set(known) or set(required) - set(x):
            raise ValueError(
                f"Text pairs must be a dict with keys {known}"
                f"{' (the second is optional)' if decoder_optional else ''}; "
                f"got {sorted(map(str, x))}."
            )
        columns = {
            key: as_texts([value] if isinstance(value, str) else value, key)
            for key, value in x.items()
        }
        sources = columns["encoder_text"]
        targets = columns.get("decoder_text", [""] * len(sources))
        if len(sources) != len(targets):
            raise ValueError(
                "`encoder_text` and `decoder_text` must have as many rows; got "
                f"{len(sources)} and {len(targets)}."
            )
        return sources, targets

    def encoder_rows(self, texts):
        """Ids of what the encoder reads, a list a text: in the template, and cut.

        Only inside of `report_truncation`, which counts what is cut.
        """
        length = self.encoder_sequence_length
        rows = self.tokenizer.tokenize(texts)
        if self.template is None:
            return self._cut(rows, length, "encoder")
        before, after = TEMPLATES.get(self.template, self.template).split("{text}")
        before, after = (
            self.tokenizer.tokenize(part, parse_control_tokens=True)
            for part in (before, after)
        )
        room = length - len(before) - len(after)
        if room < 1:
            raise ValueError(
                f"`encoder_sequence_length` {length} leaves no room for text "
                f"beside the {length - room} tokens of the template."
            )
        # The text is cut, never the template around it.
        rows = self._cut(rows, room, "encoder")
        return [before + row + after for row in rows]

    def _encoder_arrays(self, rows, multiple):
        width = round_up(rows, self.encoder_sequence_length, multiple)
        return named("encoder", *pad(rows, width))

    def _cut(self, rows, length, side):
        self.count(side, sum(len(row) > length for row in rows), len(rows))
        return [row[:length] for row in rows]

    def count(self, what, some, of):
        """Note inside of `report_truncation` that some of so many were cut."""
        before = self._counts.get(what, (0, 0))
        self._counts[what] = (before[0] + some, before[1] + of)

    def get_config(self):
        return {
            **super().get_config(),
            "encoder_sequence_length": self.encoder_sequence_length,
            "decoder_sequence_length": self.decoder_sequence_length,
            "template": self.template,
            "pad_to_multiple_of": self.pad_to_multiple_of,
        }


def _texts(x):
    texts = x["text"] if isinstance(x, dict) and set(x) == {"text"} else x
    return as_texts([texts] if isinstance(texts, str) else texts, "x")


def round_up(rows, limit, multiple=None):
    """The width for rows of ids: `limit`, or what they need, a multiple if it fits."""
    if multiple is None:
        return limit
    longest = max(1, max(map(len, rows), default=1))
    return min(limit, buckets.round_up(longest, multiple))


def _check_objective(preprocessor):
    """Raise `ValueError` when a preprocessor cannot work with its objective."""
    objective = preprocessor.objective
    if not (hasattr(objective, "pairs") and hasattr(objective, "mode_tokens")):
        raise ValueError(
            "`objective` must be a PrefixLM or UL2 of `keras_t5gemma.objectives`; "
            f"got {objective!r}."
        )
    if preprocessor.template is not None:
        raise ValueError("`template` must be None with an `objective`.")
    ids = [*objective.sentinels.tolist(), *objective.mode_tokens.values()]
    size = preprocessor.tokenizer.vocabulary_size()
    if ids and not 0 <= min(ids) <= max(ids) < size:
        raise ValueError(
            "`sentinels` and `mode_tokens` of the objective must be ids in "
            f"[0, {size}); got ids from {min(ids)} to {max(ids)}."
        )
    if preprocessor.longest_text() < 3:
        raise ValueError(
            "`encoder_sequence_length` "
            f"{preprocessor.encoder_sequence_length} and `decoder_sequence_length` "
            f"{preprocessor.decoder_sequence_length} are too short for the "
            "`objective`: a text of 3 tokens does not fit."
        )


def pad(rows, width):
    """Right-pad lists of ids with 0: int32 ids and mask, `(rows, width)`."""
    ids = np.zeros((len(rows), width), "int32")
    mask = np.zeros((len(rows), width), "int32")
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask


def named(side, ids, mask):
    """Ids and mask as inputs of a backbone, or of a task, of that side."""
    return {f"{side}_token_ids": ids, f"{side}_padding_mask": mask}

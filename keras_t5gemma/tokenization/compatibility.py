"""Checks that model, preprocessor, tokenizer and objective fit together."""

from typing import Any

from keras_t5gemma.tokenization.token_ids import check_vocabulary
from keras_t5gemma.tokenization.truncation import CountsTruncation
from keras_t5gemma.utils.checks import shown


def check_preprocessor(
    preprocessor: Any, needed_by: str, vocabulary_size: int | None = None
) -> None:
    """Raise `ValueError` for anything but a fitting `Seq2SeqLMPreprocessor`.

    Args:
        preprocessor: what was passed.
        needed_by: name of the class or method, for the message.
        vocabulary_size: of the model; its tokenizer must not have more ids.
    """
    if not isinstance(preprocessor, CountsTruncation):
        raise ValueError(
            f"`preprocessor` of {needed_by} must be a Seq2SeqLMPreprocessor; got "
            f"{shown(preprocessor)}."
        )
    if vocabulary_size is not None:
        tokenizer: Any = preprocessor.tokenizer  # type: ignore[attr-defined]
        check_vocabulary(tokenizer, vocabulary_size)


def check_objective(preprocessor: Any) -> None:
    """Raise `ValueError` if a preprocessor does not fit its objective."""
    objective = preprocessor.objective
    if not (hasattr(objective, "pairs") and hasattr(objective, "mode_tokens")):
        raise ValueError(
            "`objective` must be a PrefixLM or UL2 of `keras_t5gemma.objectives`; "
            f"got {shown(objective)}."
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

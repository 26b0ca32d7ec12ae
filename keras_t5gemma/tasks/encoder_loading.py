"""The encoder of a checkpoint, without a head."""

from typing import Any

from keras_t5gemma.checkpoints import catalog, presets
from keras_t5gemma.modeling.backbone import Backbone
from keras_t5gemma.tokenization.preprocessor import Seq2SeqLMPreprocessor
from keras_t5gemma.utils.checks import flag


def load_encoder(preset: Any, load_weights: bool, kwargs: dict) -> tuple:
    """The encoder of a checkpoint, without a head.

    Args:
        preset: see `EncoderTask.from_preset`.
        load_weights: `False` leaves the weights random.
        kwargs: arguments of the caller, changed in place: those of the backbone are
            taken out, and the checkpoint's preprocessor is added if there is none.

    Returns:
        `(source, backbone, options)`: the `presets.Source`, `None` if nothing was read;
        a `Backbone` without a decoder; and the arguments taken out of `kwargs`.
    """
    flag(load_weights, "load_weights")
    preset = presets.take_location(preset, kwargs)
    is_offline = not load_weights and catalog.published_config(preset) is not None
    source = None if is_offline else presets.resolve(preset)
    of_backbone = ("dtype", "verify_checksums", "allow_non_finite")
    options = {name: kwargs.pop(name) for name in of_backbone if name in kwargs}
    backbone = Backbone.from_preset(
        preset if source is None else source, load_weights, encoder_only=True, **options
    )
    if "preprocessor" not in kwargs:
        kwargs["preprocessor"] = None
        if source is not None:
            kwargs["preprocessor"] = Seq2SeqLMPreprocessor.from_preset(source)
    return source, backbone, options

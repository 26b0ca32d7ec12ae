"""Encoder-decoder Gemma for Keras 3: load, fine-tune, generate."""

import importlib.util as _util
import os as _os

if "KERAS_BACKEND" not in _os.environ:  # Keras's default may not be installed.
    _found = [b for b in ("jax", "torch", "tensorflow") if _util.find_spec(b)]
    if _found and not _util.find_spec("tensorflow"):
        _os.environ["KERAS_BACKEND"] = _found[0]

try:
    import keras_hub as _keras_hub  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "keras_hub":
        raise
    raise ModuleNotFoundError(
        "keras_t5gemma needs keras-hub: `pip install --no-deps 'keras-hub>=0.32'` "
        "(without --no-deps it brings TensorFlow, which only that backend needs).",
        name="keras_hub",
    ) from error

from keras_t5gemma.checkpoints.adapt import adapt_gemma2 as adapt_gemma2
from keras_t5gemma.checkpoints.presets import presets as presets
from keras_t5gemma.config import StackConfig as StackConfig
from keras_t5gemma.config import T5GemmaConfig as T5GemmaConfig
from keras_t5gemma.modeling.backbone import Backbone as Backbone
from keras_t5gemma.tasks.seq2seq_lm import Seq2SeqLM as Seq2SeqLM
from keras_t5gemma.text.preprocessor import (
    Seq2SeqLMPreprocessor as Seq2SeqLMPreprocessor,
)
from keras_t5gemma.text.tokenizer import Tokenizer as Tokenizer

__version__ = "0.1.0"

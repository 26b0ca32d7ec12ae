"""Base classes of backbone, tasks, preprocessor and tokenizer.

If KerasHub was imported before, they are KerasHub's: its `from_preset` then finds our
presets, and `isinstance` holds. Otherwise they are the classes here, on Keras alone,
with the part of KerasHub's interface that this package and its users call. Importing
KerasHub takes TensorFlow with it where that is installed, and its metadata requires it
on Linux, so `import keras_t5gemma` does neither.
"""

import sys
from typing import TYPE_CHECKING, Any

import keras


class _Properties:
    """Assignment through properties, and before a model is constructed.

    On PyTorch a layer is otherwise registered under the name of the property, whose
    setter is not called, and nothing can be assigned before the torch module exists.
    Such attributes have no default in the class: it would hide the registered one.
    The names of the attributes are those of KerasHub, which saved files contain.
    """

    _can_track = False  # Set when the model is constructed.

    def __setattr__(self, name: str, value: Any) -> None:
        is_property = isinstance(getattr(type(self), name, None), property)
        is_early = keras.config.backend() == "torch" and not self._can_track
        if is_property or is_early:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


class _FromConfig:
    """Construction from a config whose values may be serialized layers."""

    @classmethod
    def from_config(cls, config: dict) -> Any:
        """Make an instance from the dict of `get_config`."""
        config = dict(config)
        for name in ("backbone", "preprocessor", "tokenizer"):
            if isinstance(config.get(name), dict):
                config[name] = keras.layers.deserialize(config[name])
        if isinstance(config.get("dtype"), dict):
            config["dtype"] = keras.dtype_policies.get(config["dtype"])
        return cls(**config)


class _Backbone(_FromConfig, _Properties, keras.Model):
    """A functional model that is saved by the arguments of its constructor."""

    def __init__(self, *args: Any, dtype: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._can_track = True
        if dtype is not None:
            self.dtype_policy = keras.dtype_policies.get(dtype)


class _Task(_FromConfig, _Properties, keras.Model):
    """A functional model around a backbone, with a preprocessor for texts."""

    backbone_cls: Any = None
    preprocessor_cls: Any = None
    sampler: Any = None
    generate_function: Any = None

    def __init__(self, *args: Any, compile: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._can_track = True
        if self.backbone is not None:
            self.dtype_policy = self.backbone.dtype_policy
        if compile:
            self.compile()

    @property
    def backbone(self) -> Any:
        """The model without the task."""
        return getattr(self, "_backbone", None)

    @backbone.setter
    def backbone(self, value: Any) -> None:
        self._backbone = value

    @property
    def preprocessor(self) -> Any:
        """The preprocessor of texts, or `None`."""
        return getattr(self, "_preprocessor", None)

    @preprocessor.setter
    def preprocessor(self, value: Any) -> None:
        self._preprocessor = value

    @property
    def layers(self) -> list:
        """The layers without the preprocessor, which has no weights."""
        return [x for x in super().layers if x is not self.preprocessor]

    def get_config(self) -> dict:
        return {
            "backbone": keras.layers.serialize(self.backbone),
            "preprocessor": keras.layers.serialize(self.preprocessor),
            "name": self.name,
        }

    def has_task_weights(self) -> bool:
        """Whether the task has weights that are not its backbone's."""
        return bool({*map(id, self.weights)} - {*map(id, self.backbone.weights)})

    def preprocess_samples(
        self, x: Any, y: Any = None, sample_weight: Any = None
    ) -> Any:
        """Arrays of a batch, by the preprocessor."""
        raise NotImplementedError

    def _arrays(self, x, y=None, sample_weight=None):
        data = self.preprocess_samples(x, y, sample_weight)
        return keras.utils.unpack_x_y_sample_weight(data)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """`keras.Model.predict` on texts in memory, or on arrays."""
        x, *rest = args or (kwargs.pop("x"),)
        return super().predict(self._arrays(x)[0], *rest, **kwargs)

    def predict_on_batch(self, x: Any) -> Any:
        return super().predict_on_batch(self._arrays(x)[0])

    def train_on_batch(
        self, x: Any, y: Any = None, sample_weight: Any = None, **kwargs: Any
    ) -> Any:
        return super().train_on_batch(*self._arrays(x, y, sample_weight), **kwargs)

    def test_on_batch(
        self, x: Any, y: Any = None, sample_weight: Any = None, **kwargs: Any
    ) -> Any:
        return super().test_on_batch(*self._arrays(x, y, sample_weight), **kwargs)


class _TextLayer(_FromConfig, _Properties, keras.layers.Layer):
    """A layer from texts to ids in Python; calling it runs `call` as it is."""

    _can_track = True
    config_file: str

    def __init__(self, config_file: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config_file = config_file or type(self).config_file

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`call`; one tuple is taken apart, as a data set's `map` passes it."""
        if len(args) == 1 and isinstance(args[0], tuple) and len(args[0]) in (2, 3):
            args = args[0]
        return self.call(*args, **kwargs)

    def get_config(self) -> dict:
        return {**super().get_config(), "config_file": self.config_file}


class _Preprocessor(_TextLayer):
    config_file = "preprocessor.json"

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the texts."""
        return getattr(self, "_tokenizer", None)

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        self._tokenizer = value

    def get_config(self) -> dict:
        tokenizer = keras.layers.serialize(self.tokenizer)
        return {**super().get_config(), "tokenizer": tokenizer}


class _Tokenizer(_TextLayer):
    config_file = "tokenizer.json"
    file_assets: Any = None


if TYPE_CHECKING or sys.modules.get("keras_hub") is None:
    Backbone = _Backbone
    Task = _Task
    Seq2SeqLMTask = _Task
    Preprocessor = _Preprocessor
    Tokenizer = _Tokenizer
else:
    from keras_hub.models import Backbone as Backbone
    from keras_hub.models import Preprocessor as Preprocessor
    from keras_hub.models import Seq2SeqLM as Seq2SeqLMTask  # noqa: F401
    from keras_hub.models import Task as Task
    from keras_hub.tokenizers import Tokenizer as Tokenizer


def is_backbone(value: Any) -> bool:
    """Whether a value is a backbone, ours or one of KerasHub."""
    hub = sys.modules.get("keras_hub")
    kinds = (Backbone,) if hub is None else (Backbone, hub.models.Backbone)
    return isinstance(value, kinds)

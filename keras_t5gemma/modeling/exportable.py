"""`export` to other runtimes: lengths that vary, on every backend."""

import contextlib
import importlib.util
import itertools
import warnings
from typing import Any

import keras

from keras_t5gemma.distribution import mesh
from keras_t5gemma.modeling.layer_iteration import iter_layers
from keras_t5gemma.utils.checks import one_of, path, shown

FORMATS = ("tf_saved_model", "onnx", "openvino", "litert", "torch")


class Exportable:
    """`export` of a functional model whose inputs are ids and padding masks."""

    inputs: Any
    layers: Any
    variables: Any

    def export(
        self,
        filepath: Any,
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        input_signature: Any = None,
        **kwargs: Any,
    ) -> None:
        """Write the forward pass for another runtime; see `keras.Model.export`.

        The file takes the model's int32 arrays of ids and padding masks by name, for
        any batch and lengths, and returns what calling the model returns: vectors of a
        `TextEmbedder`, scores of a `TextClassifier`, logits of a `Seq2SeqLM`. It holds
        no tokenizer and no generation; `save_to_huggingface` writes a folder that
        others generate from.

        - `"tf_saved_model"`: a folder; on TensorFlow, and on JAX with TensorFlow
          installed. From JAX each call copies the weights that are not trainable, as
          below adapters and when quantized.
        - `"onnx"`: on PyTorch, float32, with the extra `onnx` installed. On the other
          backends Keras asks for a converter (tf2onnx, jax2onnx), which is not
          tested here.
        - The other formats of `keras.Model.export` are not tested here; most have the
          lengths of `input_signature`.

        Args:
            filepath: file, or folder of a SavedModel.
            format: `"tf_saved_model"`, `"onnx"`, `"openvino"`, `"litert"` or `"torch"`.
            verbose: print what was written; `None` is Keras's default of the format.
            input_signature: dict of a `keras.InputSpec` by name of each input, also as
                the only element of a list. `None` in a shape leaves a size open; by
                default batch and lengths are open.
            **kwargs: options of the format.

        Raises:
            ValueError: for a format that is unknown or that the backend cannot write,
                a signature of other inputs, or on the devices of `distribute`.
            ImportError: for a format whose package is not installed, named.

        Examples:
        ```python
        embedder = keras_t5gemma.TextEmbedder.from_preset("t5gemma_mini")
        embedder.export("embedder.onnx", format="onnx")  # KERAS_BACKEND=torch
        ```
        """
        one_of(format, "format", FORMATS)
        backend = keras.config.backend()
        if format == "tf_saved_model" and backend == "torch":
            raise ValueError(
                "`format` must be 'onnx' or 'torch' on PyTorch: 'tf_saved_model' needs "
                "TensorFlow or JAX (KERAS_BACKEND)."
            )
        if backend == "jax" and mesh.current() is not None:
            raise ValueError(
                "`export` needs a process without `distribute`: save_to_preset here, "
                "load the preset there."
            )
        if backend == "torch" and format == "onnx":
            _need_onnx()
            self._check_float32()
        specs = _specs([x.name for x in self.inputs], input_signature)
        if backend == "jax" and format == "tf_saved_model":
            options = dict(kwargs.pop("jax2tf_kwargs", None) or {})
            named = {name: _named(name, spec.shape) for name, spec in specs.items()}
            kwargs["jax2tf_kwargs"] = {"polymorphic_shapes": [named]} | options
        # PyTorch warns of shapes that are read in Python; Keras traces one token.
        with self._without_gradients(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(softmax over axis|trace)")
            # Keras calls the exporter that takes lengths that vary.
            warnings.simplefilter("ignore", DeprecationWarning)
            super().export(  # type: ignore[misc]
                path(filepath, "filepath"), format, verbose, [specs], **kwargs
            )

    @contextlib.contextmanager
    def _without_gradients(self):
        """PyTorch traces no sum of parameters, as of LoRA, that needs gradients.

        `torch.no_grad()` would choose kernels that other runtimes lack.
        """
        is_torch = keras.config.backend() == "torch"
        # Not `parameters()`, which lacks adapters that were added later.
        tensors = [v.value for v in self.variables] if is_torch else []
        tensors = [tensor for tensor in tensors if tensor.requires_grad]
        try:
            for tensor in tensors:
                tensor.requires_grad_(False)
            yield
        finally:
            for tensor in tensors:
                tensor.requires_grad_(True)

    def _check_float32(self):
        # Not the preprocessor and the inputs, which compute nothing and have a dtype.
        for layer in itertools.chain.from_iterable(map(iter_layers, self.layers)):
            if isinstance(layer, keras.layers.InputLayer):
                continue
            mode = getattr(layer, "quantization_mode", None)
            if mode or layer.compute_dtype in ("float16", "bfloat16"):
                raise ValueError(
                    "`format='onnx'` needs a model in float32 on PyTorch; layer "
                    f"{layer.path!r} has {mode or layer.compute_dtype}. Load it with "
                    "dtype='float32' and do not quantize it: ONNX Runtime's own tools "
                    "make the file smaller."
                )


def _need_onnx():
    if importlib.util.find_spec("onnx") is None:
        raise ImportError(
            "`format='onnx'` needs the package onnx: pip install 'keras-t5gemma[onnx]'."
        )


def _specs(names, given):
    """An `InputSpec` for each input, with its name, which ONNX files have."""
    if given is None:
        given = dict.fromkeys(names, keras.InputSpec(shape=(None, None), dtype="int32"))
    elif isinstance(given, list | tuple) and len(given) == 1:
        (given,) = given
    are_specs = isinstance(given, dict) and all(
        isinstance(spec, keras.InputSpec) and len(spec.shape or ()) == 2
        for spec in given.values()
    )
    if not are_specs or set(given) != set(names):
        raise ValueError(
            "`input_signature` must be a dict of a `keras.InputSpec` of two sizes for "
            f"each of {names}; got {shown(given)}."
        )
    return {
        name: keras.InputSpec(shape=spec.shape, dtype=spec.dtype, name=name)
        for name, spec in given.items()
    }


def _named(name, shape):
    """An input's shape for jax2tf, with open lengths named by the side.

    Keras names each length separately, which ids and their mask do not allow.
    """
    sizes = zip(shape, ("batch", name.split("_")[0]), strict=True)
    words = [open_size if size is None else str(size) for size, open_size in sizes]
    return f"({', '.join(words)})"

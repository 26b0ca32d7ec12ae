"""`export` to other runtimes: lengths that vary, on every backend."""

import contextlib
import warnings
from typing import Any

import keras
import numpy as np

from keras_t5gemma.modeling.layer_iteration import iter_layers
from keras_t5gemma.utils.checks import one_of

FORMATS = ("tf_saved_model", "onnx", "openvino", "litert", "torch")


class Exportable:
    """`export` of a functional model whose inputs are ids and padding masks."""

    inputs: Any
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
          installed.
        - `"onnx"`: on PyTorch, float32, with the extra `onnx` installed. On the other
          backends Keras asks for a converter (tf2onnx, jax2onnx), which is not
          tested here.
        - The other formats of `keras.Model.export` are not tested here; most have the
          lengths of `input_signature`.

        Args:
            filepath: file, or folder of a SavedModel.
            format: `"tf_saved_model"`, `"onnx"`, `"openvino"`, `"litert"` or `"torch"`.
            verbose: print what was written; `None` is Keras's default of the format.
            input_signature: shapes and dtypes of the inputs, in a list; `None` leaves
                batch and lengths open.
            **kwargs: options of the format.

        Raises:
            ValueError: for a format that is unknown or that the backend cannot write.
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
        names = [x.name for x in self.inputs]
        if backend == "jax" and format == "tf_saved_model" and input_signature is None:
            options = dict(kwargs.pop("jax2tf_kwargs", None) or {})
            # Keras gives each length a name of its own, so ids and mask differ.
            shapes = {name: f"(batch, {name.split('_')[0]})" for name in names}
            kwargs["jax2tf_kwargs"] = {"polymorphic_shapes": [shapes]} | options
        if backend == "torch" and format == "onnx":
            self._check_float32()
        tokens = np.ones((1, 2), "int32")
        # PyTorch warns of shapes that are read in Python; Keras traces one token.
        with self._without_gradients(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(softmax over axis|trace)")
            # Keras calls the exporter that takes lengths that vary.
            warnings.simplefilter("ignore", DeprecationWarning)
            # Keras refuses a model that was never called.
            self({n: tokens for n in names}, training=False)  # type: ignore[operator]
            super().export(  # type: ignore[misc]
                filepath, format, verbose, input_signature, **kwargs
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
        for layer in iter_layers(self):
            mode = getattr(layer, "quantization_mode", None)
            if mode or layer.compute_dtype in ("float16", "bfloat16"):
                raise ValueError(
                    "`format='onnx'` needs a model in float32 on PyTorch; layer "
                    f"{layer.path!r} has {mode or layer.compute_dtype}. Load it with "
                    "dtype='float32' and do not quantize it: ONNX Runtime's own tools "
                    "make the file smaller."
                )

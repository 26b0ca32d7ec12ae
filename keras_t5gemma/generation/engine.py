"""The decoding loop, compiled where the backend compiles.

JAX and TensorFlow compile `start` and `advance` with XLA, once for the shapes of
their arrays. PyTorch reads sources with `torch_source` and runs the step of
`torch_step`, compiled on request.
"""

import os
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_t5gemma.distribution import mesh
from keras_t5gemma.distribution.prediction import JaxFunction, TensorFlowFunction
from keras_t5gemma.generation import beam, decoding
from keras_t5gemma.generation.options import GenerationOptions
from keras_t5gemma.utils.checks import whole_number


class Engine:
    """The compiled decoding loop for one model and one set of static options.

    Args:
        backbone: a `Backbone`. Make a new engine when its set of variables changes
            (LoRA, quantization).
        options: the `static_options` of a `GenerationOptions`.
        compiled: on PyTorch, whether to compile the step.
        known_tokens: see `decoding.advance`.
        torch_steps: on PyTorch, the dict in which engines of one backbone share steps,
            which may hold copies of its weights.
    """

    def __init__(
        self,
        backbone: Any,
        options: GenerationOptions,
        compiled: bool = False,
        known_tokens: int | None = None,
        torch_steps: dict | None = None,
    ) -> None:
        rest = (options, known_tokens)

        def start(inputs):
            return decoding.start(backbone, inputs, options, read=source_reader())

        def advance(state, limit):
            step = decoding.plain_step(backbone)
            return decoding.advance(step, state, limit, *rest)

        compile = function_class()
        if compile is EagerTorch:
            advance = _torch_advance(
                backbone, rest, compiled, {} if torch_steps is None else torch_steps
            )
        self._start = compile(backbone, start)
        self._advance = compile(backbone, advance, donate=True)

    def start(self, inputs: dict) -> dict:
        """See `decoding.start`; NumPy arrays are accepted."""
        inputs = keras.tree.map_structure(ops.convert_to_tensor, inputs)
        return self._start(mesh.split_rows(inputs))

    def advance(self, state: dict, limit: int) -> dict:
        """See `decoding.advance`; the state passed must not be used again."""
        limit = mesh.split_rows(ops.convert_to_tensor(limit, "int32"))
        return self._advance(state, limit)

    def compiled_programs(self) -> int:
        """Number of programs compiled so far."""
        return self._start.count() + self._advance.count()


def results(state: dict, options: GenerationOptions) -> tuple[np.ndarray, ...]:
    """The generated `(token_ids, token_log_probs)`, NumPy `(rows, L)` each."""
    arrays = {
        name: mesh.to_numpy(value)  # All processes gather in the same order.
        for name, value in state.items()
        if name not in ("cache", "draft_cache", "traced_args")
    }
    if options.num_beams > 1:
        return beam.results(arrays, options)
    return arrays["token_ids"], arrays["token_log_probs"]


def cache_compiled_programs(
    folder: str | os.PathLike, max_bytes: int | None = None
) -> None:
    """Persist compiled programs in a folder, for later processes (JAX only).

    Args:
        folder: path; made when needed. Programs of other versions are ignored.
        max_bytes: size of the folder, above which the programs that were not used for
            longest are deleted; `None` for no limit.

    Raises:
        ValueError: on a backend other than JAX, or for a size below 1.
    """
    if max_bytes is not None:
        max_bytes = whole_number(max_bytes, "max_bytes", 1)
    if keras.config.backend() != "jax":
        raise ValueError(
            "Compiled programs are cached on the JAX backend only; this is "
            f"{keras.config.backend()}."
        )
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()  # It stays with the first folder otherwise.
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_compilation_cache_max_size", max_bytes or -1)


class EagerTorch:
    """A function without gradients; arguments as in `JaxFunction`."""

    def __init__(self, backbone, function, donate=False):
        self._function = function

    def __call__(self, *args):
        import torch

        with torch.inference_mode():
            return self._function(*args)

    def count(self):
        """Nothing is compiled: 0."""
        return 0


def function_class() -> Any:
    """How the functions of an engine run on this backend."""
    kinds = {"jax": JaxFunction, "tensorflow": TensorFlowFunction}
    return kinds.get(keras.config.backend(), EagerTorch)


def source_reader() -> Callable:
    """How sources are read on this backend; see `decoding.read_source`."""
    if keras.config.backend() != "torch":
        return decoding.read_source
    from keras_t5gemma.generation import torch_source

    return torch_source.read


def torch_steps(
    backbone: Any, compiled: bool, made: dict
) -> Callable[[bool], Callable | None]:
    """Steps of a model on PyTorch for its current weights.

    Args:
        backbone: a `Backbone`.
        compiled: whether to compile them.
        made: the dict in which they are kept.

    Returns:
        Function from whether a step is used for one row only, to a step; or to `None`
        for a model that `torch_step` does not support.
    """
    from keras_t5gemma.generation import torch_step

    # Inductor cannot compile FBGEMM's products, and its int8 products are slower.
    compiled = compiled and not backbone.decoder.token_embedding.quantization_mode

    def make_step(one_row):
        if not torch_step.is_supported(backbone):
            return None
        key = (torch_step.fingerprint(backbone), compiled, compiled and one_row)
        step = made.get(key)
        if step is None:
            if any(other[0] != key[0] for other in list(made)):  # Threads add others.
                made.clear()
            step = torch_step.TorchStep(backbone, compiled, one_row)
            step = made[key] = torch_step.CompiledStep(step) if compiled else step
        return step

    return make_step


def _torch_advance(backbone, rest, compiled, made):
    make_step = torch_steps(backbone, compiled, made)

    def advance(state, limit):
        step = make_step(len(state["token_ids"]) == 1) or decoding.plain_step(backbone)
        return decoding.advance(step, state, limit, *rest)

    return advance

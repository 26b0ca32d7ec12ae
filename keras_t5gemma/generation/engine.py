"""The decoding loop, compiled where the backend compiles.

JAX and TensorFlow compile `start` and `advance` with XLA, once for the shapes of
their arrays. PyTorch runs the step of `torch_step`, compiled on request.
"""

import os

import keras
from keras import ops

from keras_t5gemma.distribution import mesh
from keras_t5gemma.distribution.prediction import JaxFunction
from keras_t5gemma.generation import beam, decoding


class Engine:
    """Starts and continues batches for one model, one set of options.

    Args:
        backbone: a `Backbone`. Make a new engine when its set of variables changes
            (LoRA, quantization).
        options: a `GenerationOptions`; of those, what `program` leaves.
        stop_ids: tuple of ids that end a row, or `None`.
        compiled: on PyTorch, whether to compile the step.
    """

    def __init__(self, backbone, options, stop_ids=None, compiled=False):
        def start(inputs):
            return decoding.start(backbone, inputs, options)

        def advance(state, limit):
            step = decoding.plain_step(backbone)
            return decoding.advance(step, state, limit, options, stop_ids)

        compile = {"jax": JaxFunction, "tensorflow": _TensorFlow, "torch": _Torch}
        compile = compile[keras.config.backend()]
        if compile is _Torch:
            advance = _torch_advance(backbone, options, stop_ids, compiled)
        self._start = compile(backbone, start)
        self._advance = compile(backbone, advance, donate=True)

    def start(self, inputs):
        """See `decoding.start`; the arrays may be NumPy's."""
        inputs = keras.tree.map_structure(ops.convert_to_tensor, inputs)
        return self._start(mesh.split_rows(inputs))

    def advance(self, state, limit):
        """See `decoding.advance`; the state that is passed must not be used again."""
        limit = mesh.split_rows(ops.convert_to_tensor(limit, "int32"))
        return self._advance(state, limit)

    def compiled_programs(self):
        """How many programs have been compiled so far."""
        return self._start.count() + self._advance.count()


def results(state, options):
    """What has been written, `(token_ids, token_log_probs)`, NumPy `(rows, L)`."""
    arrays = {
        name: mesh.to_numpy(value)  # In order: all processes gather the same one.
        for name, value in state.items()
        if name not in ("cache", "knobs")
    }
    if options.num_beams > 1:
        return beam.results(arrays, options)
    return arrays["token_ids"], arrays["token_log_probs"]


def cache_compiled_programs(folder):
    """Keep compiled programs in a folder, so that the next process need not compile.

    Args:
        folder: path; made when needed. Programs of other versions are not used.

    Raises:
        ValueError: on another backend than JAX, whose compiler this is.
    """
    if keras.config.backend() != "jax":
        raise ValueError(
            "Compiled programs are kept on the JAX backend only; this is "
            f"{keras.config.backend()}."
        )
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()  # It stays with the first folder otherwise.
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class _TensorFlow:
    def __init__(self, backbone, function, donate=False):
        import tensorflow as tf

        self._compiled = tf.function(function, jit_compile=True)

    def __call__(self, *args):
        return self._compiled(*args)

    def count(self):
        return self._compiled.experimental_get_tracing_count()


class _Torch:
    def __init__(self, backbone, function, donate=False):
        self._function = function

    def __call__(self, *args):
        import torch

        with torch.inference_mode():
            return self._function(*args)

    def count(self):
        return 0


def _torch_advance(backbone, options, stop_ids, compiled):
    from keras_t5gemma.generation import torch_step

    made = {}  # Steps of the present weights.
    # FBGEMM's products are none of Inductor's, and its own of int8 are slower.
    compiled = compiled and not backbone.decoder.token_embedding.quantization_mode

    def make_step(one_row):
        if not torch_step.is_supported(backbone):
            return decoding.plain_step(backbone)
        key = (torch_step.fingerprint(backbone), compiled and one_row)
        if key not in made:
            if any(other[0] != key[0] for other in made):
                made.clear()
            made[key] = torch_step.TorchStep(backbone, compiled, one_row)
            if compiled:
                made[key] = torch_step.CompiledStep(made[key])
        return made[key]

    def advance(state, limit):
        step = make_step(one_row=len(state["token_ids"]) == 1)
        return decoding.advance(step, state, limit, options, stop_ids)

    return advance

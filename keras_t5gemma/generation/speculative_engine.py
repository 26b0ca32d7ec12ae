"""Engines of speculative decoding: programs, and the number of proposed tokens."""

from typing import Any

import keras
from keras import ops

from keras_t5gemma.distribution import mesh
from keras_t5gemma.generation import speculative
from keras_t5gemma.generation.engine import EagerTorch, function_class, torch_steps
from keras_t5gemma.generation.options import GenerationOptions
from keras_t5gemma.utils.backends import on_cpu

_CPU_ROW_COST = {"torch": 0.2, "torch int8": 0.1, "jax": 0.4, "tensorflow": 0.4}
_ACCELERATOR_ROW_COST = 0.02
# Accepted and tried tokens that are assumed at the start, and how many are remembered.
_ASSUMED = (3.0, 5.0)
_REMEMBERED = 32
_PASSES_UNSURE, _PASSES = 4, 8  # In one call.


class SpeculativeEngine:
    """`engine.Engine` for speculative decoding: a program for each of `LENGTHS`.

    Args:
        backbone: see `Engine`.
        options: see `Engine`.
        compiled: see `Engine`; the passes on PyTorch are eager.
        known_tokens: see `Engine`.
        steps: see `Engine`.
    """

    def __init__(
        self,
        backbone: Any,
        options: GenerationOptions,
        compiled: bool = False,
        known_tokens: int | None = None,
        steps: dict | None = None,
    ) -> None:
        compile = function_class()
        make_step, run = (lambda: speculative.plain_step(backbone)), speculative.advance
        if compile is EagerTorch:
            make_step, run = _torch_step(backbone, steps), speculative.advance_on_host

        def make_advance(k):
            def advance(state, limit, passes):
                rest = (k, options, known_tokens)
                return run(make_step(), state, limit, passes, *rest)

            return compile(backbone, advance, donate=True)

        self._start = compile(
            backbone, lambda inputs: speculative.start(backbone, inputs, options)
        )
        self._advance = {k: make_advance(k) for k in speculative.LENGTHS}
        self.row_cost = row_cost(backbone)
        # Row passes, and the tokens written in them, since the engine was made.
        self.row_passes = self.tokens_written = 0

    def start(self, inputs: dict) -> dict:
        """See `speculative.start`; NumPy arrays are accepted."""
        inputs = keras.tree.map_structure(ops.convert_to_tensor, inputs)
        return self._start(mesh.split_rows(inputs))

    def advance(self, state: dict, limit: int, passes: int, k: int) -> dict:
        """See `speculative.advance`; the state passed must not be used again."""
        bounds = limit, passes
        if keras.config.backend() != "torch":
            bounds = mesh.split_rows(
                tuple(ops.convert_to_tensor(b, "int32") for b in bounds)
            )
        return self._advance[k](state, *bounds)

    def compiled_programs(self) -> int:
        """Number of programs compiled so far."""
        return sum(f.count() for f in (self._start, *self._advance.values()))


class AdaptiveEngine:
    """The interface of `Engine` for one request: chooses k from what was accepted.

    A pass over k + 1 positions costs more than a pass over one, and writes more tokens
    only where proposals are accepted. The costs are assumed, not measured, so that
    the same request always takes the same passes.

    Args:
        engine: a `SpeculativeEngine`.
    """

    def __init__(self, engine: SpeculativeEngine) -> None:
        self.engine = engine
        self.accepted, self.tried = _ASSUMED

    def start(self, inputs: dict) -> dict:
        """See `SpeculativeEngine.start`."""
        return self.engine.start(inputs)

    def advance(self, state: dict, limit: int) -> dict:
        """See `decoding.advance`; rows may be generated beyond `limit`."""
        before = mesh.to_numpy(state["counts"])
        while True:
            rows = state["token_ids"].shape[0]
            k = best_length(self.accepted / self.tried, rows, self.engine.row_cost)
            sure = self.tried >= _REMEMBERED / 2
            passes = _PASSES if sure else _PASSES_UNSURE
            state = self.engine.advance(state, limit, passes, k)
            counts = mesh.to_numpy(state["counts"])
            self._learn(*(counts - before))
            before = counts
            index, done = mesh.to_numpy(state["index"]), mesh.to_numpy(state["done"])
            if (done | (index >= limit)).all():
                return state

    def _learn(self, row_passes, written, accepted, tried):
        self.engine.row_passes += int(row_passes)
        self.engine.tokens_written += int(written)
        self.accepted += accepted
        self.tried += tried
        keep = min(1.0, _REMEMBERED / self.tried)
        self.accepted, self.tried = keep * self.accepted, keep * self.tried


def best_length(rate: float, rows: int, row_cost: float) -> int:
    """The one of `speculative.LENGTHS` that writes most tokens in a time.

    Args:
        rate: probability that a proposed token is accepted.
        rows: number of rows.
        row_cost: the share of its first row that each further row, or position, adds to
            the time of a pass.
    """

    def speed(k):
        written = sum(rate**i for i in range(k + 1))
        return written / (1 + row_cost * (rows * (k + 1) - 1))

    return max(speculative.LENGTHS, key=speed)


def row_cost(backbone: Any) -> float:
    """The share of its first row that each further row adds to the time of a pass.

    Rounded from measurements, see benchmarks/speculate.py. The first row takes the time
    of reading the weights, the others that of the arithmetic.

    Args:
        backbone: a `Backbone`.
    """
    if not on_cpu(backbone.decoder.final_norm.scale):
        return _ACCELERATOR_ROW_COST
    mode = backbone.decoder.token_embedding.quantization_mode
    name = keras.config.backend()
    return _CPU_ROW_COST.get(f"{name} {mode}", _CPU_ROW_COST[name])


def _torch_step(backbone, steps):
    import torch

    made = torch_steps(backbone, False, {} if steps is None else steps)
    window = backbone.config.decoder.sliding_window

    def make_step():
        fast, plain = made(False), speculative.plain_step(backbone)
        device = backbone.decoder.final_norm.scale.value.device

        def run(tokens, cache, index, capped):
            first = int(index[0])
            # One token at one position needs no mask until a ring is full.
            is_simple = tokens.shape[1] == 1 and first < window
            tokens = torch.as_tensor(tokens, device=device)
            if fast and is_simple and (index == first).all():
                return fast(tokens[:, 0], cache, first, capped)
            index = torch.as_tensor(index, device=device)
            return (fast or plain)(tokens, cache, index, capped)

        return run

    return make_step

"""Engines of speculative decoding: programs, and the number of proposed tokens."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_t5gemma.distribution import mesh
from keras_t5gemma.generation import drafting, speculative
from keras_t5gemma.generation.batch_shapes import decoder_token_seconds
from keras_t5gemma.generation.engine import (
    EagerTorch,
    function_class,
    source_reader,
    torch_steps,
)
from keras_t5gemma.generation.options import GenerationOptions
from keras_t5gemma.modeling import float_products
from keras_t5gemma.utils.backends import on_cpu

# Of the time of one row.
_ACCELERATOR_ROW = 0.02
_XLA_ROW = 0.1
_TORCH_SECONDS_PER_LAYER = 5e-4  # Of calling operations, whatever their size.
_REMEMBERED = 32  # Tried tokens.
_PASSES_UNSURE, _PASSES = 4, 8  # In one call.


class SpeculativeEngine:
    """`engine.Engine` for speculative decoding: a program for each of `LENGTHS`.

    Args:
        backbone: see `Engine`.
        options: see `Engine`.
        compiled: see `Engine`; the passes on PyTorch are eager.
        known_tokens: see `Engine`.
        steps: see `Engine`.
        draft_steps: `steps` of the draft.
    """

    def __init__(
        self,
        backbone: Any,
        options: GenerationOptions,
        compiled: bool = False,
        known_tokens: int | None = None,
        steps: dict | None = None,
        draft_steps: dict | None = None,
    ) -> None:
        compile = function_class()
        draft = options.draft and options.draft.backbone
        # Of the draft's passes, as a share of the target's.
        self.draft_cost = drafting.relative_cost(draft, backbone) if draft else 0.0
        self.time = relative_time(backbone)
        # Row passes, and the tokens written in them, since the engine was made.
        self.row_passes = self.tokens_written = 0

        is_torch = compile is EagerTorch
        run = speculative.advance_on_host if is_torch else speculative.advance
        make_step = _step_maker(backbone, is_torch, steps)
        make_draft_step = _step_maker(draft, is_torch, draft_steps) if draft else None

        def make_advance(k):
            def advance(state, limit, passes):
                rest = [k, options, known_tokens]
                if make_draft_step:
                    step = make_draft_step() if k else None
                    rest.append(drafting.make_proposer(step, *rest[1:]))
                return run(make_step(), state, limit, passes, *rest)

            model = _Together(backbone, draft) if draft and k else backbone
            return compile(model, advance, donate=True)

        read = source_reader()
        self._start = compile(
            backbone, lambda inputs: speculative.start(backbone, inputs, options, read)
        )
        self._start_draft = compile(
            draft or backbone,
            lambda inputs: speculative.start(draft, inputs, options, read)["cache"],
        )
        self._advance = {k: make_advance(k) for k in speculative.LENGTHS}

    def start(self, inputs: dict, drafts: bool = False) -> dict:
        """See `speculative.start`; NumPy arrays are accepted.

        Args:
            inputs: see `decoding.start`.
            drafts: whether the draft reads the source too.
        """
        inputs = keras.tree.map_structure(ops.convert_to_tensor, inputs)
        inputs = mesh.split_rows(inputs)
        state = self._start(inputs)
        if drafts:
            state["draft_cache"] = self._start_draft(inputs)
        return state

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
        functions = (self._start, self._start_draft, *self._advance.values())
        return sum(function.count() for function in functions)


class _Together:
    """The variables of two models, one of which may be the other."""

    def __init__(self, *models):
        found = {id(v): v for model in models for v in model.variables}
        self.variables = list(found.values())


class AdaptiveEngine:
    """The interface of `Engine` for one request: chooses k from what was accepted.

    A pass over k + 1 positions costs more than a pass over one, and writes more tokens
    only where proposals are accepted. The costs are assumed, not measured, so that
    the same request always takes the same passes.

    Args:
        engine: a `SpeculativeEngine`.
    """

    assumed = (3.0, 5.0)  # Accepted and tried tokens, at the start.

    def __init__(self, engine: SpeculativeEngine) -> None:
        self.engine = engine
        self.accepted, self.tried = self.assumed

    def start(self, inputs: dict) -> dict:
        """See `SpeculativeEngine.start`."""
        return self.engine.start(inputs)

    def advance(self, state: dict, limit: int) -> dict:
        """See `decoding.advance`; rows may be generated beyond `limit`."""
        before = mesh.to_numpy(state["counts"])
        while True:
            k = self._length(state)
            sure = self.tried >= _REMEMBERED / 2
            passes = _PASSES if sure else _PASSES_UNSURE
            state = self.engine.advance(state, limit, passes, k)
            counts = mesh.to_numpy(state["counts"])
            self._learn(k, *(counts - before))
            before = counts
            index, done = mesh.to_numpy(state["index"]), mesh.to_numpy(state["done"])
            if (done | (index >= limit)).all():
                return state

    def _length(self, state):
        """The number of tokens to propose."""
        return self._best_length(state["token_ids"].shape[0])

    def _best_length(self, rows):
        costs = self.engine.time, self.engine.draft_cost
        return best_length(self.accepted / self.tried, rows, *costs)

    def _learn(self, k, row_passes, written, accepted, tried):
        self.engine.row_passes += int(row_passes)
        self.engine.tokens_written += int(written)
        self.accepted += accepted
        self.tried += tried
        keep = min(1.0, _REMEMBERED / self.tried)
        self.accepted, self.tried = keep * self.accepted, keep * self.tried


class DraftingEngine(AdaptiveEngine):
    """`AdaptiveEngine` with a draft.

    Where drafting does not pay, the draft is left out for the rest of the batch: its
    cache is dropped, and nothing is learned. It is tried again after one batch, and
    if it is left out then too after 3, 7, ... further ones.
    """

    assumed = (4.0, 5.0)

    def __init__(self, engine: SpeculativeEngine) -> None:
        super().__init__(engine)
        self.pause = self.batches_left = 0

    def start(self, inputs: dict) -> dict:
        """See `SpeculativeEngine.start`."""
        rows = inputs["decoder_token_ids"].shape[0]
        drafts = self.batches_left == 0 and self._best_length(rows) > 0
        self.batches_left = max(0, self.batches_left - 1)
        return self.engine.start(inputs, drafts)

    def _length(self, state):
        if "draft_cache" not in state:
            return 0
        k = super()._length(state)
        if k == 0:
            del state["draft_cache"]
            self.pause = self.batches_left = 2 * self.pause + 1
            self.accepted, self.tried = self.assumed
        return k

    def _learn(self, k, row_passes, written, accepted, tried):
        if k == 0:
            accepted = tried = 0
        super()._learn(k, row_passes, written, accepted, tried)


def best_length(
    rate: float, rows: int, time: Callable[[int], float], draft_cost: float = 0.0
) -> int:
    """The one of `speculative.LENGTHS` that writes most tokens in a time.

    Args:
        rate: probability that a proposed token is accepted.
        rows: number of rows.
        time: from `relative_time`.
        draft_cost: time of a pass of the draft, as a share of the target's.
    """

    def speed(k):
        written = sum(rate**i for i in range(k + 1))
        drafting = draft_cost * (time(2 * rows) + (k - 1) * time(rows)) if k else 0
        return written / (time(rows * (k + 1)) + drafting)

    return max(speculative.LENGTHS, key=speed)


def relative_time(backbone: Any) -> Callable[[int], float]:
    """Time of a pass of the decoder, as a multiple of that of one row and position.

    Rounded from measurements, see benchmarks/speculate.py. The first row takes the time
    of reading the weights, further ones that of the arithmetic. On CPUs, XLA copies the
    weights of a product of several rows, which doubles the time, but not those of JAX's
    int8 products; PyTorch's calls take the most time of a small model, for any number
    of rows.

    Args:
        backbone: a `Backbone`.

    Returns:
        Function of the number of rows, times positions.
    """
    if not on_cpu(backbone.decoder.final_norm.scale):
        return lambda rows: 1 + _ACCELERATOR_ROW * (rows - 1)
    is_quantized = bool(backbone.decoder.token_embedding.quantization_mode)
    if keras.config.backend() != "torch":
        copies = not is_quantized or keras.config.backend() == "tensorflow"
        return lambda rows: 1 + (rows > 1) * copies + _XLA_ROW * (rows - 1)
    row = decoder_token_seconds(backbone)
    if is_quantized:
        row /= 4
    calls = _TORCH_SECONDS_PER_LAYER * backbone.config.decoder.num_layers
    share = row / (calls + 4.5 * row)
    is_float32 = backbone.decoder.compute_dtype == "float32" and not is_quantized
    if is_float32 and float_products.has_onednn():  # It takes products of many rows.
        few = float_products.MANY_ROWS
        return lambda rows: 1 + share * (min(rows, few) - 1 + 0.4 * max(0, rows - few))
    return lambda rows: 1 + share * (rows - 1)


def _step_maker(backbone, is_torch, steps):
    """Function that makes the step of a model for its current weights."""
    if not is_torch:
        return lambda: speculative.plain_step(backbone)
    import torch

    made = torch_steps(backbone, False, {} if steps is None else steps)
    # One token at one position needs no mask until a ring is full. Beyond the last
    # position, where a draft proposes too, only the path of several tokens has angles.
    config = backbone.config
    simple = min(config.decoder.sliding_window, config.max_positions)

    def make_step():
        fast, plain = made(False), speculative.plain_step(backbone)
        device = backbone.decoder.final_norm.scale.value.device

        def run(tokens, cache, index, capped):
            first = int(index[0])
            is_simple = tokens.shape[1] == 1 and first < simple
            tokens = torch.as_tensor(tokens, device=device)
            if fast and is_simple and (index == first).all():
                return fast(tokens[:, 0], cache, first, capped)
            index = torch.as_tensor(index, device=device)
            return (fast or plain)(tokens, cache, index, capped)

        return run

    return make_step

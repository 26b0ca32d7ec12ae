"""Run the requests of `Seq2SeqLM.generate` and `stream`, batch by batch."""

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_t5gemma.distribution import mesh, process_group
from keras_t5gemma.generation.batch_shapes import estimated_costs
from keras_t5gemma.generation.decoding import select
from keras_t5gemma.generation.drafting import check_draft
from keras_t5gemma.generation.engine import results
from keras_t5gemma.generation.engine_cache import EngineCache
from keras_t5gemma.generation.keras_hub_sampler import SamplerEngine
from keras_t5gemma.generation.options import GenerationOptions, make_options
from keras_t5gemma.generation.requests import Request, batches
from keras_t5gemma.generation.speculative_engine import AdaptiveEngine, DraftingEngine
from keras_t5gemma.utils.buckets import bucket, power_of_two
from keras_t5gemma.utils.progress import progress_bar

_TOKENS_PER_CALL = 8


class Generator:
    """Decodes for one task and keeps its compiled programs.

    Args:
        task: a `Seq2SeqLM`.
    """

    def __init__(self, task: Any) -> None:
        self.task = task
        self.engines = EngineCache(task.backbone)

    def options(self, given: dict, request: Request) -> GenerationOptions | None:
        """Checked `GenerationOptions` from the task's sampler and a user's keywords.

        Args:
            given: the user's keywords.
            request: a `Request`.

        Returns:
            Options, with a seed if they sample; `None` when the task's sampler is of a
            kind that options cannot express.
        """
        sampler = self.task.sampler
        options = make_options(sampler, given)
        if options is None:
            return None
        size = known_tokens(self.task) or self.task.backbone.config.vocabulary_size
        options.check(size, request.max_length)
        if options.draft is not None:
            check_draft(options.draft, self.task, request)
        if options.no_repeat_ngram_size >= request.max_length:  # It cannot repeat.
            options = dataclasses.replace(options, no_repeat_ngram_size=0)
        if options.is_sampling and options.seed is None:
            generator = getattr(sampler, "seed_generator", None)
            seed = keras.random.randint((), 0, 2**31 - 1, "int32", generator)
            options = dataclasses.replace(options, seed=int(seed))
        return options

    def decode(
        self, request: Request, options: GenerationOptions | None, batch_size: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Generate for all rows of a request; rows of similar length share a batch.

        Args:
            request: a `Request`.
            options: from `options`.
            batch_size: maximum number of decoder rows in a batch, not counting
                `rows_per_source`.

        Returns:
            `(ids, log_probs, ends)`: int32 and float32 `(rows, max length)`, and int
            `(rows,)`, an upper bound of the tokens written; `num_return_sequences`
            adjacent rows for each row of the request.
        """
        engine: Any
        if options is None:
            options, width = GenerationOptions(), request.max_length
            engine = SamplerEngine(self.task, request.stop_ids)
        else:
            width = self._width(request.max_length)
            engine = self._engine(options)
        max_length = request.max_length
        answers = options.num_return_sequences
        prompts = request.arrays["decoder_token_ids"]
        ids = np.repeat(prompts[:, None], answers, axis=1)  # rows, answers, L
        log_probs = np.zeros(ids.shape, "float32")
        ends = np.repeat(request.prompt_lengths[:, None], answers, axis=1)
        costs = self._costs(options, width)
        planned = list(batches(request, options, batch_size, width, costs))
        shapes = Counter(_shape(inputs) for _, inputs in planned)
        deadline = _deadline(options)
        with progress_bar("Generating", len(prompts)) as advance:
            for rows, inputs in planned:
                size = len(inputs["prompt_lengths"]) // options.rows_per_source
                real = np.arange(size) < len(rows)  # The others are filler.
                # With a compiler a smaller batch is a new program, which must pay off.
                same = shapes[_shape(inputs)]
                shrinks = costs is None or costs.shrinking_pays(size, same)
                parts = _write(engine, inputs, real, max_length, deadline, shrinks)
                for chosen, state, end in parts:
                    kept = real[chosen]
                    places = rows[chosen[kept]]
                    written, scores = (
                        array.reshape(len(chosen), answers, -1)[kept, :, :max_length]
                        for array in results(state, options)
                    )
                    ids[places], log_probs[places] = written, scores
                    ends[places] = np.maximum(ends[places], end[kept, None])
                    advance(len(places))
                if _is_late(deadline):
                    break
        flat = (len(prompts) * answers, -1)
        return ids.reshape(flat), log_probs.reshape(flat), ends.reshape(-1)

    def stream(self, request: Request, options: GenerationOptions) -> Iterator[str]:
        """Yield the answer to a request of one row in pieces of text."""
        engine, deadline = self._engine(options), _deadline(options)
        width = self._width(request.max_length)
        costs = self._costs(options, width)
        (_, inputs) = next(batches(request, options, 1, width, costs))
        state = engine.start(inputs)
        begin, tokenizer = _index(state), self.task.preprocessor.tokenizer
        shown = tokenizer.detokenize(inputs["decoder_token_ids"][0, :begin].tolist())
        limit = begin
        while limit < request.max_length:
            state = engine.advance(state, limit + 1)
            limit = max(limit + 1, _index(state))
            ids = mesh.to_numpy(state["token_ids"])[0, :limit].tolist()
            is_last = limit == request.max_length
            is_last |= bool(mesh.to_numpy(state["done"])[0]) or _is_late(deadline)
            written = tokenizer.detokenize(ids)
            whole = is_last or not written.endswith("\ufffd")
            if whole and len(written) > len(shown):
                yield written[len(shown) :]
                shown = written
            if is_last:
                return

    def compiled_programs(self) -> int:
        """Number of programs compiled so far."""
        return self.engines.compiled_programs()

    def _width(self, max_length):
        """Length of the decoder's arrays, rounded up so that few programs exist."""
        if not self._is_compiled():
            return max_length
        return min(bucket(max_length), self.task.backbone.config.max_positions)

    def _is_compiled(self):
        """Whether a new batch shape needs a new program."""
        return keras.config.backend() != "torch" or bool(self.task.jit_compile)

    def _costs(self, options, width):
        """Estimated times with a compiler; `None` without."""
        if not self._is_compiled():
            return None
        return estimated_costs(self.task.backbone, options, width)

    def _engine(self, options):
        known = known_tokens(self.task)
        engine = self.engines.get(options, bool(self.task.jit_compile), known)
        if options.draft is not None:
            return DraftingEngine(engine)
        return AdaptiveEngine(engine) if options.speculates else engine


def known_tokens(task: Any) -> int | None:
    """How many ids the tokenizer has, where the model has more; else `None`.

    The vocabularies of models are often padded. The additional ids have no text and
    are never generated.

    Args:
        task: a `Seq2SeqLM`.
    """
    tokenizer = getattr(task.preprocessor, "tokenizer", None)
    if tokenizer is None:
        return None
    size = tokenizer.vocabulary_size()
    return size if size < task.backbone.config.vocabulary_size else None


def _index(state):
    """Number of tokens of the only row."""
    return int(mesh.to_numpy(state["index"]).max())


def _shape(inputs):
    """What distinguishes the programs of a request's batches."""
    names = ("encoder_token_ids", "prefix_token_ids", "prompt_lengths")
    return tuple(inputs[name].shape for name in names)


def _deadline(options):
    if options.max_time is None:
        return math.inf
    return time.monotonic() + options.max_time


def _is_late(deadline):
    """Whether the deadline has passed, by the clock of the first process."""
    if deadline == math.inf:
        return False
    return process_group.from_first(time.monotonic() > deadline)


def _write(engine, inputs, real, max_length, deadline, shrinks):
    """Decode a batch; drop its finished rows each time that half of them are done.

    Args:
        engine: an `Engine`.
        inputs: from `batches`.
        real: bool `(B,)`, `False` for rows that only fill the batch.
        max_length: position to stop at.
        deadline: time of `time.monotonic` to stop at.
        shrinks: whether to drop finished rows.

    Yields:
        `(chosen, state, ends)`: row numbers, each row once; their state; and for each
        a position up to which it is generated, `max_length` for one that is finished.
    """
    state, end = engine.start(inputs), int(inputs["prefix_count"]) + 1
    chosen = np.arange(len(real))
    while True:
        end = min(end + _TOKENS_PER_CALL, max_length)
        state = engine.advance(state, end)
        done = mesh.to_numpy(state["done"]).reshape(len(chosen), -1).all(axis=1)
        done |= ~real[chosen]
        if done.all() or end == max_length or _is_late(deadline):
            # Speculation may finish a row beyond `end`.
            yield chosen, state, np.where(done, max_length, end)
            return
        size = mesh.round_up(power_of_two(np.count_nonzero(~done)))
        if shrinks and size < len(chosen):
            order = np.argsort(done, kind="stable")
            finished = select(state, order[size:], len(order))
            yield chosen[order[size:]], finished, np.full(len(order) - size, max_length)
            state = select(state, order[:size], len(order))
            chosen = chosen[order[:size]]

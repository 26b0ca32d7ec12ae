"""The engines of one model: a bounded number, which share copies of its weights."""

import threading
from collections import OrderedDict
from typing import Any

from keras_t5gemma.generation.engine import Engine
from keras_t5gemma.generation.options import GenerationOptions
from keras_t5gemma.generation.speculative_engine import SpeculativeEngine

_KEPT = 16  # Their programs take 10 to 20 MB each on JAX.


class EngineCache:
    """The most recently used engines of a backbone, by static options.

    Threads may use it. LoRA and quantization replace variables: the engines made
    before are then dropped. Engines with a draft keep it in memory, so those of one
    draft only are kept, the last one used.

    Args:
        backbone: a `Backbone`.
    """

    def __init__(self, backbone: Any) -> None:
        self._backbone = backbone
        self._engines: OrderedDict[tuple, Any] = OrderedDict()
        self._variables: tuple = ()
        self._draft_variables: tuple = ()
        self._torch_steps: dict = {}
        self._draft_steps: dict = {}
        self._lock = threading.Lock()

    def get(
        self, options: GenerationOptions, compiled: bool, known_tokens: int | None
    ) -> Engine | SpeculativeEngine:
        """The engine for some options, made when needed; see `Engine`."""
        variables = tuple(map(id, self._backbone.variables))
        key = (options.static_options(), compiled, known_tokens)
        with self._lock:
            if variables != self._variables:
                self._engines.clear()
                self._variables, self._torch_steps = variables, {}
            if options.draft is not None:
                self._keep_one_draft(options.draft.backbone)
            engine = self._engines.get(key)
            if engine is None:
                arguments = (self._backbone, *key, self._torch_steps)
                if options.speculates:
                    engine = SpeculativeEngine(*arguments, self._draft_steps)
                else:
                    engine = Engine(*arguments)
                self._engines[key] = engine
            self._engines.move_to_end(key)
            while len(self._engines) > _KEPT:
                self._engines.popitem(last=False)
        return engine

    def _keep_one_draft(self, backbone):
        """Drop the engines of other drafts, or of other variables."""
        variables = tuple(map(id, backbone.variables))
        if variables == self._draft_variables:
            return
        for key in [key for key in self._engines if key[0].draft is not None]:
            del self._engines[key]
        self._draft_variables, self._draft_steps = variables, {}

    def compiled_programs(self) -> int:
        """Number of programs that the engines have compiled."""
        with self._lock:
            return sum(engine.compiled_programs() for engine in self._engines.values())

    def clear(self) -> None:
        """Drop all engines."""
        with self._lock:
            self._engines.clear()
            self._torch_steps, self._draft_steps = {}, {}

    def __len__(self) -> int:
        return len(self._engines)

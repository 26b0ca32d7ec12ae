"""The context of inference: faster arithmetic that has no gradient.

Generation, embeddings and classes are computed in it, training and the forward pass of
a model in a program of the user are not. Inside, layers with int8 weights may round
their activations (`int8_products`), and PyTorch runs the blocks of an encoder without
Keras layers (`torch_encoder`).
"""

import contextlib
import contextvars
from collections.abc import Iterator

_IS_INFERENCE = contextvars.ContextVar("is_inference", default=False)


@contextlib.contextmanager
def inference() -> Iterator[None]:
    """Context in which results need no gradient."""
    token = _IS_INFERENCE.set(True)
    try:
        yield
    finally:
        _IS_INFERENCE.reset(token)


def is_inference() -> bool:
    """Whether the code runs in `inference`."""
    return _IS_INFERENCE.get()

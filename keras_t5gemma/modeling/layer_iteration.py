"""Every layer of a model."""

from collections.abc import Iterator

import keras


def sublayers(layer: keras.layers.Layer) -> Iterator[keras.layers.Layer]:
    """The layers in the attributes of a layer, lists and dicts of layers included."""
    seen = {id(layer)}
    for child in _layers_in(vars(layer)):
        if id(child) not in seen:
            seen.add(id(child))
            yield child


def iter_layers(layer: keras.layers.Layer) -> Iterator[keras.layers.Layer]:
    """A layer and all layers below it, each once, parents first.

    Keras has no public way: `Model.layers` is one level deep, and other layers have
    no `layers`. Attributes are where it finds them too.
    """
    seen = set()
    stack = [layer]
    while stack:
        found = stack.pop()
        if id(found) not in seen:
            seen.add(id(found))
            yield found
            stack += reversed(list(sublayers(found)))


def _layers_in(value):
    if isinstance(value, keras.layers.Layer):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _layers_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _layers_in(item)

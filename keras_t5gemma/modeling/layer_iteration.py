"""Every layer of a model."""

from collections.abc import Iterator

import keras


def sublayers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layers in the attributes of a layer, lists and dicts of layers included."""
    found = {}
    values = list(vars(layer).values())
    for value in values:  # Grows on the way.
        if isinstance(value, keras.layers.Layer):
            found[id(value)] = value
        elif isinstance(value, dict):
            values += value.values()
        elif isinstance(value, (list, tuple)):  # noqa: UP038  A union is slower.
            values += value
    return list(found.values())


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
            stack += reversed(sublayers(found))


def path_of(layer: keras.layers.Layer) -> str:
    """Path of a layer, without the names of what its model was made in."""
    folders = (layer.path or layer.name).split("/")
    towers = [i for i, name in enumerate(folders) if name in ("encoder", "decoder")]
    return "/".join(folders[towers[-1] if towers else 0 :])


def is_projection_or_embedding(layer: keras.layers.Layer) -> bool:
    """Whether `Backbone.quantize` quantizes a layer by default."""
    return isinstance(layer, keras.layers.Dense | keras.layers.Embedding)

"""Type aliases for annotations."""

from typing import Any, TypeAlias

# An array of the chosen backend, concrete or traced, or a NumPy array: Keras has no
# common type for them.
Tensor: TypeAlias = Any

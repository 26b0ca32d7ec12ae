"""Sizes in bytes: numbers, or strings with a unit such as `"80GB"` or `"500 MiB"`."""

import math
import numbers
import re

from keras_t5gemma.utils.checks import shown

UNITS = {"B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}
_MAX_GB = 10_000


def parse_bytes(value: float | str, name: str, unit: str = "B") -> int:
    """Bytes of a size, e.g. `"80GB"`, `"79.6 GiB"` or `1024`.

    Args:
        value: a number, or a string of a number and a unit: B, KB, MB, GB, TB (powers
            of 1,000), KiB, MiB, GiB or TiB (powers of 1,024).
        name: of the argument, for the message.
        unit: of a number without one.

    Raises:
        ValueError: naming the argument, for anything else.
    """
    is_size = isinstance(value, str | numbers.Real) and not isinstance(value, bool)
    text = str(value) if is_size else ""
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    try:
        if match:
            size = float(match[1]) * UNITS[match[2] or unit]
            if 0 < size < math.inf:
                return max(1, round(size))
    except (KeyError, ValueError):
        pass
    unit = "bytes" if unit == "B" else unit
    raise ValueError(
        f"`{name}` must be a number of {unit}, or a size with a unit, e.g. '80GB' "
        f"or '80GiB'; got {shown(value)}."
    )


def parse_shard_size(max_shard_size: float | str) -> int:
    """Bytes of an argument `max_shard_size`: a number of GB, or a size with a unit.

    Raises:
        ValueError: for an invalid size, or a number of GB above 10,000, which must be
            meant in bytes.
    """
    size = parse_bytes(max_shard_size, "max_shard_size", unit="GB")
    if not isinstance(max_shard_size, str) and max_shard_size > _MAX_GB:
        raise ValueError(
            f"`max_shard_size` must be a number of GB up to {_MAX_GB:,}, or a size "
            f"with a unit, e.g. '5GB' or '500MB'; got {max_shard_size!r}."
        )
    return size

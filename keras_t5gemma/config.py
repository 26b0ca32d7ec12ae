"""Model configurations: the sizes of a tower and of an encoder-decoder pair."""

import dataclasses
from typing import Any

from keras_t5gemma.utils.checks import MAX_COUNT, number, shown, whole_number

SLIDING, FULL = "sliding_attention", "full_attention"


MAX_LAYERS = 10_000


def _store_counts(config, *names):
    for name in names:
        high = MAX_LAYERS if name == "num_layers" else MAX_COUNT
        value = whole_number(getattr(config, name), name, 1, high)
        object.__setattr__(config, name, value)


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """One tower: an encoder, or a decoder without its cross-attention.

    The defaults that are not sizes are Gemma 2's (arXiv 2408.00118, table 1),
    which every T5Gemma tower shares.

    Args:
        num_layers: number of blocks.
        hidden_dim: model width D.
        intermediate_dim: feed-forward width F, before gating.
        num_query_heads: N.
        num_key_value_heads: K; must divide N.
        head_dim: H, even, because rotary embedding turns pairs.
        sliding_window: W, in tokens. A local decoder layer sees keys with
            `0 <= query - key < W`, a local encoder layer `|query - key| < W`.
        layer_types: `"sliding_attention"` or `"full_attention"` for each layer;
            `None` alternates them, starting with sliding.
        query_scale: factor on the queries; `None` is `head_dim ** -0.5`.
        attention_soft_cap: `c * tanh(logits / c)` on the attention logits, or
            `None`.
        rope_base: base of the rotary frequencies.
        rms_norm_epsilon: added to the mean square.

    Raises:
        ValueError: naming the field, its value, and what is accepted.

    Examples:
        >>> stack = keras_t5gemma.StackConfig(
        ...     num_layers=2, hidden_dim=64, intermediate_dim=128,
        ...     num_query_heads=4, num_key_value_heads=2, head_dim=16,
        ... )
        >>> stack.layer_types
        ('sliding_attention', 'full_attention')
    """

    num_layers: int
    hidden_dim: int
    intermediate_dim: int
    num_query_heads: int
    num_key_value_heads: int
    head_dim: int
    sliding_window: int = 4096
    layer_types: tuple[str, ...] = None  # type: ignore[assignment]
    query_scale: float = None  # type: ignore[assignment]
    attention_soft_cap: float | None = 50.0
    rope_base: float = 10_000.0
    rms_norm_epsilon: float = 1e-6

    def __post_init__(self):
        _store_counts(
            self,
            "num_layers",
            "hidden_dim",
            "intermediate_dim",
            "num_query_heads",
            "num_key_value_heads",
            "head_dim",
            "sliding_window",
        )
        if self.num_query_heads % self.num_key_value_heads:
            raise ValueError(
                "`num_query_heads` must be a multiple of `num_key_value_heads`; "
                f"got {self.num_query_heads} and {self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"`head_dim` must be even; got {self.head_dim}.")
        if self.attention_soft_cap is not None:
            number(self.attention_soft_cap, "attention_soft_cap", above=0, other="None")
        for name in ("rope_base", "rms_norm_epsilon"):
            number(getattr(self, name), name, above=0)
        scale = self.query_scale
        if scale is None:
            scale = self.head_dim**-0.5
        scale = number(scale, "query_scale", above=0, other="None")
        object.__setattr__(self, "query_scale", scale)
        types = self.layer_types
        if types is None:
            types = [FULL if i % 2 else SLIDING for i in range(self.num_layers)]
        if isinstance(types, list):  # As JSON gives them back.
            types = tuple(types)
        if (
            not isinstance(types, tuple)
            or len(types) != self.num_layers
            or any(kind not in (SLIDING, FULL) for kind in types)
        ):
            raise ValueError(
                f"`layer_types` must be {self.num_layers} of {SLIDING!r} or "
                f"{FULL!r}; got {shown(types)}."
            )
        object.__setattr__(self, "layer_types", types)

    def count_params(self) -> int:
        """Number of parameters of the tower.

        Returns:
            That of the blocks and the final norm, without embedding.
        """
        d, h = self.hidden_dim, self.head_dim
        attention = 2 * d * h * (self.num_query_heads + self.num_key_value_heads)
        block = attention + 3 * d * self.intermediate_dim + 4 * d
        return self.num_layers * block + d


# The released sizes, docs/facts.md, section 2: layers, width, feed-forward, query
# heads, key/value heads, head size. Comments: parameters without the embedding.
STACKS = {
    "s": StackConfig(8, 512, 1024, 8, 8, 64),  # 20,988,416
    "b": StackConfig(12, 768, 2048, 12, 12, 64),  # 84,972,288
    "l": StackConfig(24, 1024, 2816, 16, 16, 64),  # 308,380,672
    "ml": StackConfig(26, 1152, 6912, 4, 4, 256),  # 743,889,024
    "xl": StackConfig(24, 2048, 5120, 32, 32, 64),  # 1,157,826,560
    "2b": StackConfig(26, 2304, 9216, 8, 4, 256),  # 2,024,517,888
    "9b": StackConfig(42, 3584, 14336, 16, 8, 256),  # 8,324,201,984
}


@dataclasses.dataclass(frozen=True)
class T5GemmaConfig:
    """Configuration of an encoder-decoder pair.

    Args:
        encoder: a `StackConfig`, or its dict.
        decoder: a `StackConfig`, or its dict; it may differ from the encoder in every
            size. `None` is an encoder alone.
        vocabulary_size: V, rows of each of the two embedding tables.
        final_soft_cap: `c * tanh(logits / c)` on the vocabulary logits, or
            `None`.
        dropout: rate on embeddings, attention weights and sub-layer outputs
            while training, in [0, 1).
        max_positions: longest sequence, in tokens, that the checkpoint was trained
            for; generation does not exceed it.

    Raises:
        ValueError: naming the field, its value, and what is accepted.

    Examples:
        >>> config = keras_t5gemma.T5GemmaConfig.pair("9b", "2b")
        >>> f"{config.count_params():,}"
        '12,292,375,296'
    """

    encoder: StackConfig
    decoder: StackConfig | None
    vocabulary_size: int = 256_000
    final_soft_cap: float | None = 30.0
    dropout: float = 0.0
    max_positions: int = 8192

    def __post_init__(self):
        for side in ("encoder", "decoder"):
            stack = getattr(self, side)
            if isinstance(stack, dict):
                object.__setattr__(self, side, _from_dict(StackConfig, stack, side))
            elif side == "decoder" and stack is None:
                continue
            elif not isinstance(stack, StackConfig):
                raise ValueError(f"`{side}` must be a StackConfig; got {shown(stack)}.")
        _store_counts(self, "vocabulary_size", "max_positions")
        if self.final_soft_cap is not None:
            number(self.final_soft_cap, "final_soft_cap", above=0, other="None")
        number(self.dropout, "dropout", at_least=0, below=1)

    @classmethod
    def pair(
        cls, encoder: str | StackConfig, decoder: str | StackConfig, **kwargs: Any
    ) -> "T5GemmaConfig":
        """A pair of released sizes, e.g. `T5GemmaConfig.pair("9b", "2b")`.

        Args:
            encoder: a key of `STACKS`: s, b, l, ml, xl, 2b, 9b; or a `StackConfig`.
            decoder: likewise. Any two can be combined: `pair("xl", "s")`.
            **kwargs: other fields of the config.

        Returns:
            A `T5GemmaConfig`.

        Raises:
            ValueError: for a size that was not released.
        """
        stacks: list[StackConfig] = []
        for name, size in (("encoder", encoder), ("decoder", decoder)):
            if isinstance(size, StackConfig):
                stacks.append(size)
            elif isinstance(size, str) and size.lower() in STACKS:
                stacks.append(STACKS[size.lower()])
            else:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(STACKS)}, or a StackConfig; "
                    f"got {shown(size)}."
                )
        return cls(stacks[0], stacks[1], **kwargs)

    def count_params(self) -> int:
        """Exact number of parameters of the pair.

        Returns:
            The sum of `count_params_by_part`, embeddings included.
        """
        return sum(self.count_params_by_part().values())

    def count_params_by_part(self) -> dict[str, int]:
        """Exact number of parameters of embeddings, blocks and cross-attention.

        Returns:
            `{part: count}` in forward order. The blocks include the final norm,
            cross-attention its two norms in each layer.
        """
        e, d = self.encoder, self.decoder
        parts = {
            "encoder embedding": self.vocabulary_size * e.hidden_dim,
            "encoder blocks": e.count_params(),
        }
        if d is not None:
            cross = d.head_dim * (
                2 * d.hidden_dim * d.num_query_heads
                + 2 * e.hidden_dim * d.num_key_value_heads
            )
            parts["decoder embedding"] = self.vocabulary_size * d.hidden_dim
            parts["decoder blocks"] = d.count_params()
            parts["cross-attention"] = d.num_layers * (cross + 2 * d.hidden_dim)
        return parts

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dict.

        Returns:
            A dict that JSON can hold, and `from_dict` reads.
        """
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "T5GemmaConfig":
        """The configuration of a dict.

        Args:
            config: what `to_dict` returned, with lists or tuples.

        Returns:
            A `T5GemmaConfig`.

        Raises:
            ValueError: for an unknown or missing field, or as the class.
        """
        return _from_dict(cls, config, "config")


def _from_dict(cls, config, name):
    if not isinstance(config, dict):
        raise ValueError(f"`{name}` must be a dict of fields; got {shown(config)}.")
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = [each for each in config if each not in known]
    if unknown:
        raise ValueError(
            f"`{name}` has unknown fields {shown(unknown)}; known: {sorted(known)}."
        )
    needed = [f.name for f in dataclasses.fields(cls) if _has_no_default(f)]
    if missing := [each for each in needed if each not in config]:
        raise ValueError(f"`{name}` must have the fields {missing}.")
    return cls(**config)


def _has_no_default(field):
    return field.default is dataclasses.MISSING

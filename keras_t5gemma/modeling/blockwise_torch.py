"""Blockwise attention on PyTorch, eager, on CPUs and as the fallback on GPUs.

The algorithm of `blockwise_attention`, with its own autograd function. What is
particular here:

- Buffers of one block are written in place, and rows of the batch are taken one by
  one, so that blocks that only padding or other segments fill are skipped in each row.
- On a CPU PyTorch's `exp2` takes a quarter of the time of `exp`, and a fifteenth of
  that of `tanh`, which is computed as `(e - 1) / (e + 1)` with `e = exp(2 x)`. Its
  error is 6e-8 whatever its size: with a cap up to 64, that of float32 logits.
- Products are float32 on a CPU, whatever the dtype of the model.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import torch

from keras_t5gemma.modeling.masks import Visibility

# Caps for which tanh may have an absolute error of 6e-8.
_LARGEST_CAP = 64.0
_LOG2_E = math.log2(math.e)
_NOTHING = -1e30


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What a block needs to know apart from its tensors.

    Args:
        segments: of queries and keys, NumPy `(B, T)` and `(B, S)`.
        reach: of a `Visibility`.
        blocks: number of queries and of keys in a block.
        cap: soft cap, or `None`.
        rate: of dropout.
        seed: of dropout.
    """

    segments: tuple[np.ndarray, np.ndarray]
    reach: tuple[int | None, int | None]
    blocks: tuple[int, int]
    cap: float | None
    rate: float
    seed: int


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visibility: Visibility,
    soft_cap: float | None,
    dropout: float,
    seed: Any,
    blocks: tuple[int, int],
) -> torch.Tensor:
    """See `blockwise_attention.attend`."""
    segments = tuple(x.cpu().numpy() for x in (visibility.queries, visibility.keys))
    number = 0 if seed is None else int(seed[0])
    rate = 0.0 if seed is None else dropout
    settings = _Settings(segments, visibility.reach, blocks, soft_cap, rate, number)
    return _Attention.apply(query, key, value, settings)


class _Attention(torch.autograd.Function):
    """Keeps queries, keys, values, output and the two parts of the log-sum-exp."""

    @staticmethod
    def forward(ctx, query, key, value, settings):
        output = torch.empty_like(query)  # B T N H
        batch, length, heads, _ = query.shape
        kv_heads = key.shape[1]
        shape = (batch, kv_heads, length * heads // kv_heads)
        largest = query.new_empty(shape, dtype=torch.float32)
        total = torch.empty_like(largest)
        for row in range(batch):
            part = _Row(query, key, value, row, settings)
            for i in part.query_blocks():
                rows = part.rows(i)
                found = part.forward(i)
                output[row, part.queries(i)] = part.from_rows(found[0]).to(output.dtype)
                largest[row, :, rows], total[row, :, rows] = found[1:]
        ctx.save_for_backward(query, key, value, output, largest, total)
        ctx.settings = settings
        return output

    @staticmethod
    def backward(ctx, *upstream):
        query, key, value, output, largest, total = ctx.saved_tensors
        by_query = torch.empty_like(query)
        by_key, by_value = torch.empty_like(key), torch.empty_like(value)
        for row in range(len(query)):
            part = _Row(query, key, value, row, ctx.settings)
            sums = torch.zeros_like(part.key), torch.zeros_like(part.value)
            for i in part.query_blocks():
                states = (x[row, part.queries(i)] for x in (output, upstream[0]))
                rows = part.rows(i)
                statistics = largest[row, :, rows], total[row, :, rows]
                found = part.backward(i, *map(part.to_rows, states), *statistics, sums)
                by_query[row, part.queries(i)] = part.from_rows(found)
            by_key[row], by_value[row] = sums
        return by_query, by_key, by_value, None


class _Row:
    """Attention of one row of the batch.

    The queries of a key/value head are rows `t G + g` of a matrix `(K, T G, H)`.
    """

    def __init__(self, query, key, value, row, settings):
        self.settings = settings
        self.length, self.heads, self.size = query.shape[1:]
        self.kv_heads, self.memory = key.shape[1:3]
        self.groups = self.heads // self.kv_heads
        on_cpu = query.device.type == "cpu"
        self.dtype = torch.float32 if on_cpu else query.dtype
        self.query = query[row]
        self.key, self.value = key[row].to(self.dtype), value[row].to(self.dtype)
        self.row = row
        self.segments = [x[row] for x in settings.segments]
        self.device_segments = [
            torch.from_numpy(np.ascontiguousarray(x)).to(query.device)
            for x in self.segments
        ]
        self.buffers = {}
        cap = settings.cap
        # Logits are `slope tanh(scale x)` with a cap, else `x`.
        self.scale, self.slope = (1.0, 1.0) if cap is None else (1 / cap, cap)
        self.fast_tanh = on_cpu and cap is not None and cap <= _LARGEST_CAP

    def query_blocks(self):
        return range(-(-self.length // self.settings.blocks[0]))

    def queries(self, i):
        """Positions of the i-th block of queries."""
        step = self.settings.blocks[0]
        return slice(i * step, min((i + 1) * step, self.length))

    def rows(self, i):
        """The rows of its matrix."""
        place = self.queries(i)
        return slice(place.start * self.groups, place.stop * self.groups)

    def to_rows(self, x):
        """`(T, N, H)` to `(K, T G, H)`, in the dtype of the products."""
        x = x.reshape(len(x), self.kv_heads, self.groups, self.size).transpose(0, 1)
        return x.reshape(self.kv_heads, -1, self.size).to(self.dtype)

    def from_rows(self, x):
        """`(K, T G, H)` to `(T, N, H)`."""
        x = x.reshape(self.kv_heads, -1, self.groups, self.size).transpose(0, 1)
        return x.reshape(-1, self.heads, self.size)

    def key_blocks(self, i):
        """The blocks of keys that a block of queries attends to: `(place, mask)`.

        The mask is `None` where all of the block is seen, else boolean
        `(queries, 1, keys)`.
        """
        place, step = self.queries(i), self.settings.blocks[1]
        behind, ahead = self.settings.reach
        first = 0 if behind is None else max(0, place.start - behind) // step * step
        last = self.memory if ahead is None else min(self.memory, place.stop + ahead)
        known = self.segments[0][place]
        for start in range(first, last, step):
            keys = slice(start, min(start + step, self.memory))
            seen = self.segments[1][keys]
            if seen.max() <= 0 or seen.max() < known[known > 0].min(initial=2**31 - 1):
                continue
            if seen[seen > 0].min() > known.max():
                continue
            whole = known.min() == known.max() == seen.min() == seen.max()
            whole &= behind is None or place.stop - 1 - keys.start <= behind
            whole &= ahead is None or keys.stop - 1 - place.start <= ahead
            yield keys, None if whole else self.mask(place, keys)

    def mask(self, place, keys):
        queries, seen = self.device_segments[0][place], self.device_segments[1][keys]
        mask = (queries[:, None] == seen) & (seen > 0)
        behind, ahead = self.settings.reach
        positions = [
            torch.arange(x.start, x.stop, device=mask.device) for x in (place, keys)
        ]
        distance = positions[0][:, None] - positions[1]
        if behind is not None:
            mask &= distance <= behind
        if ahead is not None:
            mask &= distance >= -ahead
        return mask[:, None]

    def buffer(self, name, rows, columns):
        """A float32 matrix `(K, rows, columns)` that is used again for every block."""
        shape = (self.kv_heads, rows, columns)
        count = math.prod(shape)
        held = self.buffers.get(name)
        if held is None or held.numel() < count:
            held = torch.empty(count, device=self.query.device)
            self.buffers[name] = held
        return held[:count].view(shape)

    def product(self, name, queries, states, scale=1.0):
        """`scale queries @ states.T`, float32, in a buffer."""
        out = self.buffer(name, queries.shape[1], states.shape[1])
        states = states.transpose(1, 2)
        if self.dtype == torch.float32:
            return torch.baddbmm(out, queries, states, beta=0, alpha=scale, out=out)
        return out.copy_(torch.bmm(queries, states)).mul_(scale)

    def scaled_logits(self, queries, place):
        """Logits divided by the slope; with a cap, that is `tanh(scale x)`."""
        scale = self.scale * (2 * _LOG2_E if self.fast_tanh else 1)
        x = self.product("logits", queries, self.key[:, place], scale)
        if not self.fast_tanh:
            return x if self.settings.cap is None else x.tanh_()
        x.clamp_max_(126.0).exp2_()  # Or infinity would be divided by infinity.
        divisor = torch.add(x, 1.0, out=self.buffer("weights", *x.shape[1:]))
        return x.sub_(1.0).div_(divisor)

    def fill(self, x, mask, number):
        """Fill with a number what the mask hides."""
        if mask is not None:
            shape = (self.kv_heads, -1, self.groups, x.shape[2])
            x.view(shape).masked_fill_(~mask, number)

    def kept(self, i, place, shape):
        """The factors of dropout of a block, or `None`."""
        rate = self.settings.rate
        if not rate:
            return None
        numbers = (self.settings.seed, self.row, i, place.start)
        seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
        generator = torch.Generator(self.query.device).manual_seed(seed % 2**63)
        kept = self.buffer("kept", *shape).bernoulli_(1 - rate, generator=generator)
        return kept.div_(1 - rate)

    def forward(self, i):
        """Output, largest scaled logit and sum of exponentials of a block."""
        queries = self.to_rows(self.query[self.queries(i)])
        largest = queries.new_full(queries.shape[:2], _NOTHING, dtype=torch.float32)
        total = torch.zeros_like(largest)
        output = torch.zeros(queries.shape, device=queries.device)
        factor = self.slope * _LOG2_E
        for place, mask in self.key_blocks(i):
            x = self.scaled_logits(queries, place)
            self.fill(x, mask, -math.inf)
            new = torch.maximum(largest, x.amax(-1))
            weights = x.sub_(new[..., None]).mul_(factor).exp2_()
            shrink = largest.sub_(new).mul_(factor).exp2_()
            total = total.mul_(shrink).add_(weights.sum(-1))
            kept = self.kept(i, place, x.shape[1:])
            weights = weights if kept is None else weights.mul_(kept)
            more = torch.bmm(weights.to(self.dtype), self.value[:, place])
            output.mul_(shrink[..., None]).add_(more)
            largest = new
        output.div_(total.clamp_min(1e-30)[..., None])
        return output, largest, total

    def backward(self, i, output, upstream, largest, total, sums):
        """Gradient of a block of queries; those of keys and values are added."""
        queries = self.to_rows(self.query[self.queries(i)])
        by_query = torch.zeros(queries.shape, device=queries.device)
        by_key, by_value = sums
        # The weights below are those before the division by their sum.
        upstream = upstream.float() / total.clamp_min(1e-30)[..., None]
        mean = (upstream * output).sum(-1, keepdim=True)
        upstream = upstream.to(self.dtype)
        factor = self.slope * _LOG2_E
        for place, mask in self.key_blocks(i):
            x = self.scaled_logits(queries, place)
            weights = self.buffer("weights", *x.shape[1:])
            torch.sub(x, largest[..., None], out=weights).mul_(factor).exp2_()
            self.fill(weights, mask, 0.0)
            slope = self.product("slopes", upstream, self.value[:, place])
            kept = self.kept(i, place, x.shape[1:])
            if kept is None:
                self.add(by_value[:, place], weights, upstream)
            else:
                slope.mul_(kept)
                self.add(by_value[:, place], kept.mul_(weights), upstream)
            slope.sub_(mean).mul_(weights)
            if self.settings.cap is not None:
                torch.ops.aten.tanh_backward.grad_input(slope, x, grad_input=slope)
            slope = slope.to(self.dtype)
            self.add(by_key[:, place], slope, queries)
            by_query.add_(torch.bmm(slope, self.key[:, place]))
        return by_query.to(self.query.dtype)

    def add(self, sums, slope, states):
        """`sums += slope.T @ states`."""
        sums.add_(torch.bmm(slope.to(self.dtype).transpose(1, 2), states))

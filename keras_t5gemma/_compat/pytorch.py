"""Private names of PyTorch."""

import functools
from typing import Any


def tensor_version(tensor: Any) -> Any:
    """How often a PyTorch tensor was written in place; there is no public counter.

    A tensor made inside `torch.inference_mode` does not count: a new object, which
    equals no other.
    """
    return object() if tensor.is_inference() else tensor._version


def fused_adam(
    variables: list,
    gradients: list,
    first: list,
    second: list,
    step: int,
    **options: Any,
) -> None:
    """PyTorch's fused Adam step, in place, on lists of tensors.

    `torch.optim.Adam(fused=True)` is the public way, but keeps moments itself.

    Args:
        variables: tensors to update.
        gradients: one each.
        first: first moments.
        second: second moments.
        step: number of this step, from 1.
        **options: `lr`, `beta1`, `beta2`, `eps`.
    """
    import torch

    steps = torch.tensor(float(step), device=variables[0].device)
    torch._fused_adam_(
        variables,
        gradients,
        first,
        second,
        [],
        [steps] * len(variables),
        weight_decay=0.0,
        amsgrad=False,
        maximize=False,
        **options,
    )


def has_per_channel_int8() -> bool:
    """Whether this PyTorch has what `per_channel_int8` needs."""
    import torch

    return hasattr(torch, "_make_per_channel_quantized_tensor")


def per_channel_int8(rows: Any, scales: Any) -> Any:
    """A quantized PyTorch tensor of int8 rows and a float64 scale a row.

    The public `torch.quantize_per_channel` starts from a float copy of the rows.
    """
    import torch

    zeros = torch.zeros(len(rows), dtype=torch.long)
    return torch._make_per_channel_quantized_tensor(rows, scales, zeros, 0)


def torch_has_int8_products() -> bool:
    """Whether `torch_int8_product` exists and runs on the processor's instructions.

    Elsewhere it is a plain loop. There is no public way to ask for VNNI instructions.
    """
    import torch

    has_vnni = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
    return hasattr(torch, "_int_mm") and bool(has_vnni())


def torch_int8_product(left: Any, right: Any) -> Any:
    """int32 product of two int8 matrices on PyTorch; public ones return int8.

    Args:
        left: `(R, in)`.
        right: `(in, out)`.
    """
    import torch

    return torch._int_mm(left, right)


@functools.cache
def torch_has_onednn_products() -> bool:
    """Whether `torch_onednn_product` exists, on a processor with AVX-512."""
    import torch

    has = torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    )
    return has and torch.backends.cpu.get_cpu_capability() == "AVX512"


def torch_onednn_product(x: Any, rows: Any) -> Any:
    """`x @ rows.T` of float32 by oneDNN, without a gradient.

    `torch.nn.functional.linear`, which is public, calls MKL.

    Args:
        x: `(..., in)`.
        rows: `(out, in)`.
    """
    import torch

    return torch.ops.mkldnn._linear_pointwise(x, rows, None, "none", [], "")


def has_torch_hooks(layer: Any) -> bool:
    """Whether a Keras layer on PyTorch, a module, or all modules have hooks.

    For the forward pass; there is no public list of them.
    """
    from torch.nn.modules.module import _has_any_global_hook

    return bool(
        layer._forward_hooks or layer._forward_pre_hooks or _has_any_global_hook()
    )


def torch_is_tracing() -> bool:
    """Whether PyTorch compiles, exports, traces, transforms or counts a function now.

    By `torch.func`, `torch.autograd.forward_ad` or a `TorchDispatchMode`, such as those
    of `make_fx` and `FlopCounterMode`; for these there is no public way to ask.
    """
    import torch

    return (
        torch.compiler.is_compiling()
        or torch.compiler.is_exporting()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )

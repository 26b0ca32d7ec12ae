"""One test a function of `_compat.pytorch`, with the library as it is installed.

A test that fails after an upgrade says which private name has gone and what to do.
"""

import inspect

import keras
import pytest
from helpers.private_names import only, require

from keras_t5gemma import _compat
from keras_t5gemma._compat import pytorch
from keras_t5gemma.modeling.float_products import matmul

ADAMS = [keras.optimizers.Adam, keras.optimizers.AdamW]


def test_every_function_has_a_test():
    functions = inspect.getmembers(pytorch, inspect.isfunction)
    own = {n for n, f in functions if f.__module__ == pytorch.__name__}
    public = {name for name in own if not name.startswith("_")}
    assert public and {f"test_{name}" for name in public} <= set(globals())


@only("torch")
def test_tensor_version():
    import torch

    tensor = torch.zeros(2)
    require(tensor, "_version", "compare the values, or count assignments.")
    before = _compat.tensor_version(tensor)
    tensor.add_(1)
    assert _compat.tensor_version(tensor) > before


@only("torch")
def test_fused_adam():
    import torch

    require(torch, "_fused_adam_", "give `torch.optim.Adam(fused=True)` the moments.")
    value, m, v = torch.ones(4), torch.full((4,), 0.5), torch.full((4,), 0.25)
    gradient = torch.tensor([1.0, -1.0, 2.0, 0.0])
    expected = torch.nn.Parameter(value.clone())
    public = torch.optim.Adam([expected], lr=0.1, betas=(0.9, 0.99), eps=1e-7)
    public.state[expected] = {
        "step": torch.tensor(2.0),
        "exp_avg": m.clone(),
        "exp_avg_sq": v.clone(),
    }
    expected.grad = gradient.clone()
    public.step()
    _compat.fused_adam(
        [value], [gradient], [m], [v], 3, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-7
    )
    assert torch.allclose(value, expected.detach(), atol=1e-6)
    assert torch.allclose(m, public.state[expected]["exp_avg"])


@only("torch")
def test_has_per_channel_int8():
    import torch

    assert _compat.has_per_channel_int8(), (
        "torch has no _make_per_channel_quantized_tensor any more: int8 models are "
        "decoded through the layers, until `per_channel_int8` makes its tensor by "
        "the public `torch.quantize_per_channel`."
    )
    assert "fbgemm" in torch.backends.quantized.supported_engines


@only("torch")
def test_torch_has_int8_products(monkeypatch):
    import torch

    require(torch.cpu, "_is_vnni_supported", "ask for the flags of the processor.")
    assert _compat.torch_has_int8_products() == torch.cpu._is_vnni_supported()
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert not _compat.torch_has_int8_products()


@only("torch")
def test_torch_int8_product():
    import torch

    require(torch, "_int_mm", "return False in `torch_has_int8_products`.")
    left = torch.full((1, 256), 127, dtype=torch.int8)
    right = torch.full((256, 2), -128, dtype=torch.int8)
    found = _compat.torch_int8_product(left, right)
    assert found.dtype == torch.int32
    assert found.tolist() == [[256 * 127 * -128] * 2]


@only("torch")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_per_channel_int8():
    import torch

    require(
        torch,
        "_make_per_channel_quantized_tensor",
        "make it by the public `torch.quantize_per_channel`, from a float copy.",
    )
    rows = torch.tensor([[1, -2], [3, 127]], dtype=torch.int8)
    scales = torch.tensor([0.5, 2.0], dtype=torch.float64)
    made = _compat.per_channel_int8(rows, scales)
    assert torch.equal(made.dequantize(), rows.float() * scales.float()[:, None])
    assert torch.equal(made.int_repr(), rows)


@only("torch")
def test_torch_has_onednn_products(monkeypatch):
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    advice = "find oneDNN's product of two matrices, or return False here."
    require(torch.ops.mkldnn, "_linear_pointwise", advice)
    assert _compat.torch_has_onednn_products() == (capability == "AVX512")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    _compat.torch_has_onednn_products.cache_clear()
    try:
        assert not _compat.torch_has_onednn_products()
    finally:
        _compat.torch_has_onednn_products.cache_clear()


@only("torch")
def test_torch_onednn_product():
    import torch

    x, rows = torch.randn(3, 10, 7), torch.randn(5, 7)
    found = _compat.torch_onednn_product(x, rows)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, x @ rows.t(), atol=1e-5, rtol=1e-5)


@only("torch")
def test_torch_is_tracing():
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    advice = "find out how PyTorch tells that `torch.func` transforms a function."
    require(torch._C._functorch, "peek_interpreter_stack", advice)
    found = []

    def function(x):
        found.append(_compat.torch_is_tracing())
        return x * 2

    x = torch.ones(2)
    function(x)
    torch.func.vmap(function)(x)
    torch.jit.trace(function, x)
    assert found[:3] == [False, True, True]
    require(torch.autograd.forward_ad, "_current_level", advice)
    with torch.autograd.forward_ad.dual_level():
        assert _compat.torch_is_tracing()
    assert not _compat.torch_is_tracing()
    require(torch._C, "_len_torch_dispatch_stack", advice)
    with FlopCounterMode(display=False) as counter:
        assert _compat.torch_is_tracing()
        large = keras.ops.ones((64, 256))
        matmul(large, keras.ops.ones((256, 256)))
    assert counter.get_total_flops() == 2 * 64 * 256 * 256
    assert not _compat.torch_is_tracing()


@only("torch")
def test_has_torch_hooks():
    import torch

    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    advice = "see where `torch.nn.Module` keeps its hooks now."
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        require(layer, name, advice)
    assert not _compat.has_torch_hooks(layer)
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
        handle = register(lambda *_: None)
        assert _compat.has_torch_hooks(layer)
        handle.remove()
    assert not _compat.has_torch_hooks(layer)
    register = torch.nn.modules.module.register_module_forward_hook
    handle = register(lambda *_: None)  # Of all modules.
    assert _compat.has_torch_hooks(layer)
    handle.remove()
    assert not _compat.has_torch_hooks(layer)

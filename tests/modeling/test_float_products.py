"""Products by oneDNN against NumPy in double precision, and where they are used."""

import keras
import numpy as np
import pytest

from keras_t5gemma import _compat
from keras_t5gemma.modeling import float_products

if keras.config.backend() != "torch":
    pytest.skip("other backends have one library", allow_module_level=True)
import torch


@pytest.fixture
def products(monkeypatch):
    """Shapes of the products that oneDNN made."""
    if not _compat.torch_has_onednn_products():
        pytest.skip("this processor or PyTorch has no products by oneDNN")
    monkeypatch.setattr(float_products, "_MANY_PRODUCTS", 1)
    made = []
    product = _compat.torch_onednn_product

    def record(x, rows):
        made.append((tuple(x.shape), tuple(rows.shape)))
        return product(x, rows)

    monkeypatch.setattr(_compat, "torch_onednn_product", record)
    return made


def matrices(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [torch.tensor(rng.normal(size=s).astype("float32")) for s in shapes]


def double(*tensors):
    return [t.detach().double() for t in tensors]


@pytest.mark.parametrize("shape", [(8, 33), (3, 5, 33), (1, 8, 33), (300, 33)])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_gradients(shape, transposed, products):
    """Of both arguments, whichever need them, contiguous or not."""
    x, weight, upstream = matrices(shape, (33, 70), (*shape[:-1], 70))
    if transposed:
        weight = weight.t().contiguous().t()
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    with torch.no_grad():
        y = float_products.matmul(x, weight)
    assert products == [(shape, (70, 33))]
    expected = torch.matmul(*double(x, weight))
    np.testing.assert_allclose(y.double(), expected, atol=2e-5)

    for needed in ((x,), (weight,), (x, weight)):
        references = double(*needed)
        for tensor, reference in zip(needed, references, strict=True):
            tensor.requires_grad_(True).grad = None
            reference.requires_grad_(True)
        y = float_products.matmul(x, weight)
        assert y.requires_grad
        y.backward(upstream)
        lookup = dict(zip(map(id, needed), references, strict=True))
        pair = [lookup.get(id(t), t.detach().double()) for t in (x, weight)]
        torch.matmul(*pair).backward(upstream.double())
        for tensor, reference in zip(needed, references, strict=True):
            np.testing.assert_allclose(tensor.grad, reference.grad, atol=1e-4)
        for tensor in (x, weight):
            assert (tensor.grad is not None) == tensor.requires_grad
            tensor.requires_grad_(False).grad = None


def test_second_derivative(products):
    """The gradient is made of the same products."""
    x, weight = matrices((20, 16), (16, 24))
    x.requires_grad_(True)
    reference = x.detach().double().requires_grad_(True)
    results = []
    for argument, matrix, product in (
        (x, weight, float_products.matmul),
        (reference, weight.double(), torch.matmul),
    ):
        loss = product(argument, matrix).pow(3).sum()
        (slope,) = torch.autograd.grad(loss, argument, create_graph=True)
        slope.pow(2).sum().backward()
        results.append(argument.grad.double())
    assert len(products) >= 4
    np.testing.assert_allclose(*results, rtol=1e-4)


def test_where_mkl_is_used(products):
    """Few rows, other dtypes, transformed and compiled functions, and by request."""
    x, weight = matrices((16, 32), (32, 24))
    expected = x @ weight

    def check(*arguments, atol=1e-5):
        got = float_products.matmul(*arguments)
        wanted = keras.ops.matmul(*arguments)
        assert not products
        np.testing.assert_allclose(got.float(), wanted.float(), atol=atol)

    check(x[:7], weight)
    check(x.double(), weight.double())
    check(x.bfloat16(), weight.bfloat16())
    check(x[:0], weight)
    try:
        torch.backends.mkldnn.enabled = False
        check(x, weight)
    finally:
        torch.backends.mkldnn.enabled = True
    with torch.autocast("cpu", torch.bfloat16):
        check(x, weight, atol=0)
    rows = torch.func.vmap(lambda r: float_products.matmul(r, weight))(
        x.expand(3, 16, 32)
    )
    np.testing.assert_allclose(rows[2], expected, atol=1e-5)
    slope = torch.func.grad(lambda w: float_products.matmul(x, w).sum())(weight)
    np.testing.assert_allclose(slope, x.sum(0)[:, None].expand(32, 24), atol=1e-4)
    _, forward = torch.func.jvp(lambda v: float_products.matmul(v, weight), (x,), (x,))
    np.testing.assert_allclose(forward, expected, atol=1e-5)

    slopes = torch.autograd.functional.jacobian(
        lambda v: float_products.matmul(v, weight).sum(0),
        x,
        strategy="forward-mode",
        vectorize=True,
    )
    np.testing.assert_allclose(slopes[3, 5], weight[:, 3], atol=1e-5)

    compiled = torch.compile(
        lambda v: float_products.matmul(v, weight), fullgraph=True, backend="eager"
    )
    np.testing.assert_allclose(compiled(x), expected, atol=1e-5)

    class Product(torch.nn.Module):
        def forward(self, x):
            return float_products.matmul(x, weight)

    program = torch.export.export(Product(), (x,), strict=False)
    assert "mkldnn" not in str(program.graph)
    assert not products


def test_what_is_kept_and_changed_in_place(products):
    """Only what a needed gradient needs; the result is no view."""
    x, weight = matrices((2, 8, 16), (16, 24))
    x.requires_grad_(True)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = float_products.matmul(x, weight)
    assert [t.shape for t in kept] == [weight.shape]
    y.mul_(2.0)
    y.sum().backward()
    expected = 2 * weight.sum(1).expand(2, 8, 16)
    np.testing.assert_allclose(x.grad, expected, atol=1e-5)


def test_small_products_are_left_to_mkl(products, monkeypatch):
    monkeypatch.undo()
    x, small, large = matrices((64, 128), (128, 64), (128, 128))
    assert not float_products.is_faster(x, small)
    if _compat.torch_has_onednn_products():
        assert float_products.is_faster(x, large)
        assert not float_products.is_faster(x[:7], large.repeat(1, 20))


def test_layers_use_them(products):
    """Projections and their gradients; loss and logits of the vocabulary."""
    from helpers.models import one_block_config

    import keras_t5gemma as kt

    backbone = kt.Backbone(one_block_config())
    ids = np.ones((2, 8), "int32")
    names = ("encoder_token_ids", "encoder_padding_mask")
    names += ("decoder_token_ids", "decoder_padding_mask")
    with torch.no_grad():
        backbone({name: ids for name in names})
    blocks = len(backbone.encoder.blocks) + len(backbone.decoder.blocks)
    assert len(products) == 7 * blocks + 4 * len(backbone.decoder.blocks)
    model = kt.Seq2SeqLM(backbone, preprocessor=None)
    model.compile(optimizer="sgd")
    del products[:]
    model.fit({name: ids for name in names}, ids, verbose=0)
    assert len(products) > 3 * (7 * blocks + 4 * len(backbone.decoder.blocks)) - 4

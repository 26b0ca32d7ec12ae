"""Compare the attention kernels of PyTorch and JAX on one GPU: values, time, memory.

    python tools/check_gpu_attention.py [--skip-jax]

Takes less than 100 s on one H100. Errors are the largest difference from the plain
attention in float32 (float64 for float32), relative to its largest number.
"""

import argparse
import os
import subprocess
import sys
import time
import types
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def import_attention():
    """The function to check and its description of a mask.

    Needs Keras alone: where other dependencies of the package are missing, it is
    imported without its `__init__`.
    """
    root = Path(__file__).parents[1]
    sys.path.insert(0, str(root))
    try:
        import keras_t5gemma  # noqa: F401
    except ImportError:
        for name in [n for n in sys.modules if n.startswith("keras_t5gemma")]:
            del sys.modules[name]
        bare = types.ModuleType("keras_t5gemma")
        bare.__path__ = [str(root / "keras_t5gemma")]
        sys.modules["keras_t5gemma"] = bare
    from keras_t5gemma.modeling.blockwise_attention import attend
    from keras_t5gemma.modeling.masks import Visibility

    return attend, Visibility


def cases():
    """`(name, T, S, N, K, H, causal, window, cap, segments)`."""
    return [
        ("full", 1024, 1024, 8, 4, 64, False, None, 50.0, "padded"),
        ("window", 1100, 1100, 8, 4, 64, False, 300, 2.0, "padded"),
        ("causal window", 1100, 1100, 8, 4, 256, True, 300, 2.0, "packed"),
        ("causal", 1024, 1024, 8, 8, 64, True, None, None, "packed"),
        ("cross", 300, 1100, 8, 4, 256, False, None, 50.0, "packed"),
    ]


def segments(kind, length, rows):
    """NumPy segment ids `(rows, length)`; the last row is empty."""
    import numpy as np

    ids = np.zeros((rows, length), "int32")
    for row in range(rows - 1):
        end = length - 100 * row - 7
        ids[row, :end] = 1
        if kind == "packed":
            ids[row, end // 3 : end] = 2
            ids[row, end // 2 : end] = 3
    return ids


def torch_plain(q, k, v, visibility, cap):
    import torch

    b, t, n, h = q.shape
    q = q.reshape(b, t, k.shape[1], -1, h)
    logits = torch.einsum("btkgh,bksh->bkgts", q, k)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    mask = visibility.mask()[:, None, None]
    weights = torch.softmax(logits.masked_fill(~mask, -1e30), -1) * mask
    return torch.einsum("bkgts,bksh->btkgh", weights, v).reshape(b, t, n, h)


def relative(found, expected):
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        scale = max(float(b.abs().max()), 1e-6)
        worst = max(worst, float((a.double() - b.double()).abs().max()) / scale)
    return worst


def torch_values(attend, visibility_type):
    import torch

    print("| case | kernel | dtype | value | gradients |")
    print("|---|---|---|---|---|")
    for name, t, s, n, kv, h, causal, window, cap, kind in cases():
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*shape, g=generator):
            return torch.randn(*shape, device="cuda", generator=g)

        q, k, v = normal(3, t, n, h) * h**-0.5, normal(3, kv, s, h), normal(3, kv, s, h)
        q *= 4
        ids = [torch.tensor(segments(kind, x, 3), device="cuda") for x in (t, s)]
        visibility = visibility_type(*ids, causal=causal, window=window)
        upstream = normal(3, t, n, h)
        for dtype in (torch.float32, torch.bfloat16):
            exact = torch.float64 if dtype == torch.float32 else torch.float32
            rounded = [x.to(dtype) for x in (q, k, v)]

            def run(function, kind, u=upstream, rounded=rounded):
                x = [a.to(kind).requires_grad_() for a in rounded]
                out = function(*x)
                return out, torch.autograd.grad(out, x, u.to(out.dtype))

            value, found = run(
                lambda *x, a=visibility, c=cap: torch_plain(*x, a, c), exact
            )
            for kernel in ("portable", "flex"):
                try:
                    out, grads = run(
                        lambda *x, a=visibility, c=cap, kernel=kernel: attend(
                            *x, a, c, kernel=kernel
                        ),
                        dtype,
                    )
                    numbers = relative([out], [value]), relative(grads, found)
                    words = " | ".join(f"{x:.1e}" for x in numbers)
                    finite = all(torch.isfinite(x).all() for x in (out, *grads))
                    words += "" if finite else " NOT FINITE"
                except Exception as error:
                    words = f"{type(error).__name__}: {str(error)[-300:]!r} | "
                print(f"| {name}, H {h} | {kernel} | {dtype} | {words} |", flush=True)


def torch_times(attend, visibility_type, stop):
    import torch

    print("| length | window | H | kernel | forward ms | + backward ms | peak MB |")
    print("|---|---|---|---|---|---|---|")
    for h, n, kv in ((256, 8, 4), (64, 12, 12)):
        for length in (4096, 8192, 16384):
            for window in (None, 4096):
                ids = torch.ones((1, length), dtype=torch.int32, device="cuda")
                visibility = visibility_type(ids, ids, window=window)
                make = [
                    torch.randn(1, *shape, h, device="cuda", dtype=torch.bfloat16)
                    for shape in ((length, n), (kv, length), (kv, length))
                ]
                for kernel in ("flex", "portable", "plain"):
                    if time.time() > stop:
                        print("(out of time)")
                        return
                    words = torch_time(attend, make, visibility, kernel)
                    print(
                        f"| {length} | {window} | {h} | {kernel} | {words} |",
                        flush=True,
                    )


def torch_time(attend, arrays, visibility, kernel):
    import torch

    def run(backward):
        x = [a.detach().requires_grad_(backward) for a in arrays]
        if kernel == "plain":
            out = torch_plain(*x, visibility, 50.0)
        else:
            out = attend(*x, visibility, 50.0, kernel=kernel)
        if backward:
            torch.autograd.grad(out, x, out.detach())

    times = []
    try:
        for backward in (False, True):
            run(backward)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            found = []
            for _ in range(3):
                start = time.perf_counter()
                run(backward)
                torch.cuda.synchronize()
                found.append(time.perf_counter() - start)
            times.append(f"{1e3 * min(found):.2f}")
        peak = (torch.cuda.max_memory_allocated() - before) / 1e6
        return f"{' | '.join(times)} | {peak:.0f}"
    except Exception as error:
        torch.cuda.empty_cache()
        return f"{type(error).__name__}: {str(error)[:150]!r} | | "


def in_jax():
    """The portable version through XLA on the GPU."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    attend, Visibility = import_attention()
    jax.config.update("jax_default_matmul_precision", "highest")
    print("JAX", jax.__version__, jax.devices())

    def plain(q, k, v, visibility, cap):
        b, t, n, h = q.shape
        q = q.reshape(b, t, k.shape[1], -1, h)
        logits = jnp.einsum("btkgh,bksh->bkgts", q, k).astype("float32")
        logits = logits if cap is None else cap * jnp.tanh(logits / cap)
        mask = visibility.mask()[:, None, None]
        weights = jax.nn.softmax(jnp.where(mask, logits, -1e30), -1) * mask
        out = jnp.einsum("bkgts,bksh->btkgh", weights.astype(v.dtype), v)
        return out.reshape(b, t, n, h)

    def both(function, causal, window, cap):
        def total(q, k, v, upstream, queries, keys):
            visibility = Visibility(queries, keys, causal, window)
            out = function(q, k, v, visibility, cap)
            return (out * upstream).sum(), out

        step = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)
        return jax.jit(lambda *x: jax.tree.leaves(step(*x))[1:])

    random = np.random.default_rng(0)
    for name, t, s, n, kv, h, causal, window, cap, kind in cases():
        shapes = (3, t, n, h), (3, kv, s, h), (3, kv, s, h), (3, t, n, h)
        arrays = [random.normal(size=x).astype("float32") for x in shapes]
        arrays[0] *= 4 * h**-0.5
        ids = [segments(kind, x, 3) for x in (t, s)]
        found, expected = (
            both(f, causal, window, cap)(*arrays, *ids) for f in (attend, plain)
        )
        errors = [
            float(abs(a - b).max() / abs(b).max())
            for a, b in zip(found, expected, strict=True)
        ]
        print(f"JAX | {name} | H {h} | float32 | {max(errors):.1e}", flush=True)
    for length in (4096, 8192, 16384):
        ids = jnp.ones((1, length), "int32")
        shapes = (1, length, 8, 64), (1, 4, length, 64), (1, 4, length, 64)
        arrays = [
            jnp.array(random.normal(size=x), "bfloat16") for x in (*shapes, shapes[0])
        ]
        for name, function in (("portable", attend), ("plain", plain)):
            try:
                step = both(function, False, None, 50.0).lower(*arrays, ids, ids)
                step = step.compile()
                peak = step.memory_analysis().temp_size_in_bytes / 1e6
                jax.block_until_ready(step(*arrays, ids, ids))
                start = time.perf_counter()
                jax.block_until_ready(step(*arrays, ids, ids))
                words = f"{1e3 * (time.perf_counter() - start):.1f} ms | {peak:.0f} MB"
            except Exception as error:
                words = f"{type(error).__name__}: {str(error)[:150]!r}"
            print(f"JAX | {length} | H 64 | {name} | {words}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--skip-jax", action="store_true")
    parser.add_argument("--jax", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=65, help="for PyTorch")
    args = parser.parse_args()
    if args.jax:
        in_jax()
        return
    stop = time.time() + args.seconds
    jax_run = None
    import torch

    attend, Visibility = import_attention()
    torch.backends.cuda.matmul.allow_tf32 = False
    print("PyTorch", torch.__version__, torch.cuda.get_device_name())
    torch_values(attend, Visibility)
    torch_times(attend, Visibility, stop)
    if not args.skip_jax:
        torch.cuda.empty_cache()
        environment = {**os.environ, "KERAS_BACKEND": "jax"}
        command = [sys.executable, __file__, "--jax"]
        jax_run = subprocess.run(command, env=environment, timeout=60)
    sys.exit(0 if jax_run is None else jax_run.returncode)


if __name__ == "__main__":
    main()

# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Switch backends
#
# What this shows: one script on JAX, TensorFlow and PyTorch. The answers and the scores
# agree, and a model saved on one backend loads on another.
#
# Keras reads its backend once, from `KERAS_BACKEND`, when it is imported. To switch is
# to start Python again. So this guide starts the same script in a process for each
# backend that is installed; most of its time is imports and compilation. The embedded
# preset needs no network.
#
# Time on two processor cores: about 1 minute.

# %% tags=["skip-execution"]
# On a hosted notebook service such as Colab or Kaggle:
# %pip install -q "keras-t5gemma[jax]"

# %%
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

backends = [
    name
    for name in ("torch", "tensorflow", "jax")
    if importlib.util.find_spec(name) is not None
]
print("installed:", ", ".join(backends))
Path("runs").mkdir(exist_ok=True)

# %% [markdown]
# The script knows nothing of backends. It loads a model, writes answers, scores a
# target, and prints what it found as one line of JSON.

# %%
SCRIPT = """
import json
import sys

import keras

import keras_t5gemma

preset, save_to = sys.argv[1:]
texts = [
    "This library reads and writes JSON files. It is written in C.",
    "A game of chess for two players, or for one player against the computer.",
]
targets = ["library to read and write JSON files", "chess game"]
model = keras_t5gemma.Seq2SeqLM.from_preset(preset)
result = {
    "backend": keras.config.backend(),
    "answers": model.generate(texts, num_beams=4),
    "log_probs": model.score(texts, targets)["log_prob"],
}
if save_to:
    model.save_to_preset(save_to)
print(json.dumps(result))
"""


def run(backend, preset, save_to=""):
    """The script's result on a backend."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, preset, save_to],
        env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"The script failed on {backend}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# %% [markdown]
# ## The same script on every backend
#
# The first one also saves the model.

# %%
results = []
for backend in backends:
    save_to = "" if results else "runs/from_first"
    results.append(run(backend, "t5gemma_mini_synopsis", save_to))
    print(f"{backend:>10}: {results[-1]['log_probs']}  {results[-1]['answers']}")

# %% [markdown]
# ## Do they agree?
#
# Sums are taken in another order on each backend, so numbers differ in their last
# digits. A log-probability of a whole answer should agree to a thousandth.


# %%
def difference(a, b):
    """The largest difference between the scores of two runs."""
    return max(abs(x - y) for x, y in zip(a["log_probs"], b["log_probs"], strict=True))


first = results[0]
for other in results[1:]:
    names = f"{first['backend']} and {other['backend']}"
    print(f"{names}: scores differ by at most {difference(first, other):.1e}")
    assert difference(first, other) < 1e-3
    assert first["answers"] == other["answers"]
print("answers agree:", len({tuple(r["answers"]) for r in results}) == 1)

# %% [markdown]
# ## Saved on one, loaded on another
#
# A preset folder holds no backend: weights, configuration, vocabulary. If only one
# backend is installed, it loads what it saved.

# %%
last = backends[-1]
loaded = run(last, "runs/from_first")
print(f"saved on {backends[0]}, loaded on {last}: {loaded['answers']}")
assert difference(first, loaded) < 1e-3
print(f"loaded model differs by at most {difference(first, loaded):.1e}")

# %% [markdown]
# ## Which one?
#
# All three train and generate. JAX compiles most and is fastest once it has compiled;
# it is the one for TPUs. PyTorch starts fastest and fits into PyTorch code and data
# loaders. TensorFlow fits into `tf.data` and its export formats. Measurements are in
# `benchmarks/RESULTS.md`.
#
# What stays the same: names, presets, saved files, answers. What differs: the stream of
# random numbers (a seed gives the same sample again on the same backend, not on
# another), the optimizer's state in a backup (it resumes on the backend that wrote it),
# and the first call, which compiles on JAX and TensorFlow.
#
# ## Larger models
#
# Nothing here changes but the preset's name and the dtype.
#
# **2B-2B on one GPU.** `from_preset("t5gemma_2b_2b_prefixlm_it", dtype="bfloat16")`:
# 5.6 billion parameters x 2 bytes = 11.2 GB. Run one process after the other, as above:
# JAX takes most of a GPU's memory when it starts, unless
# `XLA_PYTHON_CLIENT_PREALLOCATE=false` is set. In bfloat16 scores agree to about a
# hundredth only, and answers may part where two tokens are about equally likely. To
# train it, see the two fine-tuning guides: LoRA of rank 16 with `mixed_bfloat16`,
# `rematerialize=True`, a batch of 8 and gradient accumulation of 4, about 26 GB.
#
# **9B-2B.** `from_preset("t5gemma_9b_2b_prefixlm_it", dtype="bfloat16")`: 12.3 x 2 =
# 24.6 GB, a card of 40 GB.

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
# # Classify and search with the encoder
#
# What this shows: half of a T5Gemma, the half that reads. It turns texts into vectors
# that find each other, and into classes; it is trained for both, saved, loaded, and
# drawn as a map. The decoder is never read from the disk.
#
# The texts are what Python says of itself, the documentation inside its standard
# library: no download.
#
# Time on two processor cores: about 2 minutes.

# %% tags=["skip-execution"]
# On a hosted notebook service such as Colab or Kaggle:
# %pip install -q "keras-t5gemma[jax]" matplotlib
# %env KERAS_BACKEND=jax

# %%
import inspect
import textwrap
from importlib import import_module
from pathlib import Path

import keras
import numpy as np

import keras_t5gemma

keras.utils.set_random_seed(0)
RUN = Path("runs/encoder")
RUN.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## Texts, each with a first line and a kind
#
# By convention a docstring begins with one line that sums it up. That makes pairs that
# belong together, the line and the rest, and the module says what kind of thing it is.
# 180 letters are enough to know what a text is about.

# %%
MODULES = {
    "files": "os shutil tempfile zipfile tarfile pathlib gzip mimetypes fileinput",
    "network": "http.client socket ssl smtplib ftplib urllib.request socketserver",
    "numbers": "math statistics decimal fractions random cmath numbers",
    "processes": "threading multiprocessing.pool subprocess asyncio queue sched signal",
    "text": "string textwrap difflib csv json re email.message html.parser argparse",
}


def docstrings(name):
    """`(first line, rest)` of each docstring of a module and of what is in it."""
    module = import_module(name)
    parts = [module, *(v for v in vars(module).values() if not inspect.ismodule(v))]
    parts += [v for p in parts if inspect.isclass(p) for v in vars(p).values()]
    for part in parts:
        doc = getattr(part, "__doc__", None)
        if isinstance(doc, str):
            line, _, rest = inspect.cleandoc(doc).partition("\n\n")
            if 3 < len(line.split()) < 20 and len(rest.split()) > 5:
                rest = textwrap.shorten(rest, 180, placeholder="")
                yield " ".join(line.split()), rest


found = {}
for kind, names in MODULES.items():
    for name in names.split():
        for line, rest in docstrings(name):
            found.setdefault(rest, (line, kind))  # Inherited ones are there once.
order = np.random.default_rng(0).permutation(len(found))
rows = [(line, rest, kind) for rest, (line, kind) in found.items()]
rows = [rows[i] for i in order]
held_out, train = rows[: len(rows) // 4], rows[len(rows) // 4 :]
print(len(train), "texts to learn from,", len(held_out), "held out")
print(held_out[0])

# %% [markdown]
# ## Search
#
# `TextEmbedder` gives each text a vector: the mean of the states of its tokens and,
# with `lexical_dim`, so many numbers more that say which tokens the text has, each
# weighed by what it says about the text. A mean of 192 numbers knows what a text is
# about and forgets its names, which the second part brings back. `embed` puts texts of
# similar length together and returns NumPy arrays in order; a text's vector does not
# depend on the others. `nearest` finds what is close.
#
# A pretrained encoder was never told what shall be close to what. How often is the text
# of a held-out first line among the ten nearest of all held-out texts?

# %%
embedder = keras_t5gemma.TextEmbedder.from_preset("t5gemma_mini", lexical_dim=4096)
print(f"{embedder.backbone.count_params():,} parameters: the encoder alone")


def recall(model, k=10):
    """How often a first line finds its text, in percent."""
    lines, texts, _ = zip(*held_out, strict=True)
    numbers, _ = keras_t5gemma.nearest(model.embed(lines), model.embed(texts), k)
    return 100 * np.mean([i in row for i, row in enumerate(numbers)])


before = recall(embedder)

# %% [markdown]
# `fit` on pairs brings together what belongs together: each first line has to find its
# own text among all texts of its batch (InfoNCE). Larger batches are harder, and
# better; `compile(gradient_cache_rows=8)` takes only so many rows into memory at a
# time.

# %%
lines, texts, _ = zip(*train, strict=True)
embedder.compile(keras.optimizers.AdamW(1e-3, global_clipnorm=1.0))
embedder.fit(list(lines), list(texts), batch_size=32, epochs=3, verbose=2)
after = recall(embedder)
print(f"found among the first ten: {before:.0f} % before, {after:.0f} % after")

# %% [markdown]
# And with words of our own:

# %%
searched = [text for _, text, _ in rows]
vectors = embedder.embed(searched)
for question in ("unpack an archive", "the mean of some numbers", "wait for a thread"):
    numbers, cosines = keras_t5gemma.nearest(embedder.embed([question]), vectors, k=2)
    print(question)
    for i, cosine in zip(numbers[0], cosines[0], strict=True):
        print(f"  {cosine:.2f}  {rows[i][0]}")

# %% [markdown]
# Saved and loaded it is the same embedder, and still half a model:

# %%
embedder.save_to_preset(RUN / "embedder")
again = keras_t5gemma.TextEmbedder.from_preset(RUN / "embedder")
same = np.allclose(again.embed(searched[:8]), vectors[:8], atol=1e-5)
print("loaded embedder agrees:", same)

# %% [markdown]
# ## A map
#
# The two directions in which the vectors differ most, found with a singular value
# decomposition. Texts of a kind lie near each other, though nobody told the embedder
# the kinds.

# %%
# %matplotlib inline
from matplotlib.figure import Figure  # noqa: E402

centred = vectors - vectors.mean(axis=0)
_, _, directions = np.linalg.svd(centred, full_matrices=False)
places = centred @ directions[:2].T
kinds = np.array([kind for _, _, kind in rows])
figure = Figure(figsize=(7, 5), layout="constrained")
axes = figure.add_subplot()
for kind in MODULES:
    x, y = places[kinds == kind].T
    axes.scatter(x, y, s=10, alpha=0.7, label=kind)
axes.set_title("Documentation of Python's standard library")
axes.set_xticks([])
axes.set_yticks([])
axes.legend()
figure.savefig(RUN / "map.png", dpi=120)
figure

# %%
neighbours, _ = keras_t5gemma.nearest(vectors, vectors, k=6)
alike = (kinds[neighbours[:, 1:]] == kinds[:, None]).mean()
chance = sum((kinds == kind).mean() ** 2 for kind in MODULES)
print(f"neighbours of the same kind: {alike:.0%}, by chance {chance:.0%}")

# %% [markdown]
# ## Classify
#
# `TextClassifier` puts a linear head on the last token's state, as the paper does for
# SuperGLUE, and trains everything. Names go in and come out. Several labels a text
# (`kind="multi_label"`), numbers (`kind="regression"`), pairs of texts and
# `enable_lora` work the same way.

# %%
classifier = keras_t5gemma.TextClassifier.from_preset(
    "t5gemma_mini", class_names=sorted(MODULES), dropout=0.1
)
classifier.compile(keras.optimizers.AdamW(1e-3, global_clipnorm=1.0))
_, texts, labels = zip(*train, strict=True)
_, held_texts, held_labels = zip(*held_out, strict=True)
classifier.fit(list(texts), list(labels), batch_size=32, epochs=3, verbose=2)
said = classifier.classify(list(held_texts))
right = np.mean([a == b for a, b in zip(said, held_labels, strict=True)])
most = max(np.mean([label == kind for label in held_labels]) for kind in MODULES)
print(f"right: {100 * right:.0f} %, the most frequent kind: {100 * most:.0f} %")

# %%
text = "Return the median of the data, the mean of the middle two if there are two."
shares = classifier.predict([text])[0]
for i in np.argsort(-shares):
    print(f"{classifier.class_names[i]:>10} {shares[i]:.2f}")

# %% [markdown]
# ## States of every token
#
# Image and video generators read texts with an encoder like this one. They want the
# state of each token, of a layer they choose, and which tokens are padding:

# %%
states, padding_mask = embedder.hidden_states(
    ["a red boat on a lake", "snow"], layers=-2, pad_to=16, as_numpy=True
)
print("states", states.shape, "tokens", padding_mask.sum(axis=1))

# %% [markdown]
# ## Is it better than something simpler?
#
# Ask before you use it. The command trains encoders, the same size from scratch,
# decoder-only models and TF-IDF on the same rows with several seeds, and writes a
# table:
#
# ```bash
# keras-t5gemma evaluate --data DATA --tasks my_folder --output results \
#     --presets t5gemma_mini --scratch t5gemma_mini --tfidf --seeds 3
# ```
#
# `DATA/my_folder` holds `train.jsonl`, `valid.jsonl` and `test.jsonl` with `text` and
# `label`, or `query` and `document`. With SuperGLUE's own folders in `DATA` its tasks
# are `boolq cb copa multirc rte wic wsc`. `benchmarks/RESULTS.md` of the repository has
# such tables for the small models of this package.
#
# ## Larger models
#
# Only the encoder counts. In bfloat16 a parameter is 2 bytes to read, with
# `dtype="mixed_bfloat16"` and AdamW 16 to train.
#
# **2B-2B on one GPU** (`t5gemma_2b_2b_ul2`, 5.6 billion parameters, 2.6 of them the
# encoder's): 2.6 x 2 = 5.2 GB to embed, 2.6 x 16 = 42 GB to train all of it, 2.6 x 4 =
# 10 GB and a little to train adapters (`enable_lora(16)`).
#
# ```python
# classifier = keras_t5gemma.TextClassifier.from_preset(
#     "t5gemma_2b_2b_ul2", class_names=names, dtype="mixed_bfloat16"
# )
# classifier.compile(keras.optimizers.AdamW(1e-5), rematerialize=True)
# ```
#
# **9B-2B** (`t5gemma_9b_2b_ul2`, 12.3 billion parameters, 9.2 of them the encoder's):
# 18 GB to embed, adapters on 9.2 x 2 = 18 GB of bfloat16 weights. An encoder to
# classify with does not need a large decoder: take the pair with the smallest one that
# has been trained with the encoder you want.

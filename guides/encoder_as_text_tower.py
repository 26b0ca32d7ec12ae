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
# # The encoder as a text tower
#
# What this shows: image, audio and video generators read their prompts with an encoder
# like this one. A small generator learns to paint from the encoder's hidden states;
# then both become one model, `TextTower` in front, that is saved and loaded as a whole.
# A table at the end has the calls that published generators need.
#
# The data are captions, such as "a red circle on the left", and their drawings, both
# made in this guide: no download.
#
# Time on two processor cores: about 1 minute.

# %% tags=["skip-execution"]
# On a hosted notebook service such as Colab or Kaggle:
# %pip install -q "keras-t5gemma[jax]" matplotlib
# %env KERAS_BACKEND=jax

# %%
import itertools
from pathlib import Path

import keras
import numpy as np
from keras import layers, ops

import keras_t5gemma

keras.utils.set_random_seed(0)
RUN = Path("runs/tower")
RUN.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## Captions and drawings
#
# Six colors, four shapes and five places make 120 drawings of 10 x 10 pixels, each with
# three captions. Twenty drawings are held out: the generator sees their words, but
# never together.

# %%
COLORS = {
    "red": (1, -1, -1),
    "green": (-1, 1, -1),
    "blue": (-1, -1, 1),
    "yellow": (1, 1, -1),
    "white": (1, 1, 1),
    "black": (-1, -1, -1),
}
PLACES = {
    "on the left": (5, 2.5),
    "on the right": (5, 7.5),
    "at the top": (2.5, 5),
    "at the bottom": (7.5, 5),
    "in the center": (5, 5),
}
SHAPES = ("circle", "square", "cross", "line")
PHRASES = ("a {0} {1} {2}", "{2}, a {1} that is {0}", "picture of a {0} {1} {2}")
SIZE = 10
WORDS = list(itertools.product(COLORS, SHAPES, PLACES))


def draw(color, shape, place):
    """A drawing, `(10, 10, 3)`, from -1 to 1, on gray."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    y, x = np.abs(y - PLACES[place][0]), np.abs(x - PLACES[place][1])
    inside = {
        "circle": y**2 + x**2 < 5,
        "square": np.maximum(y, x) < 2.5,
        "cross": (np.minimum(y, x) < 0.6) & (np.maximum(y, x) < 2.6),
        "line": (y < 0.6) & (x < 2.6),
    }[shape]
    return np.where(inside[..., None], COLORS[color], 0.0)


images = np.array([draw(*words) for words in WORDS], "float32")
held_out = np.random.default_rng(0).permutation(len(WORDS))[:20]
train = np.setdiff1d(np.arange(len(WORDS)), held_out)
captions = [phrase.format(*words) for words in WORDS for phrase in PHRASES]
print(len(captions), "captions:", *captions[:3], sep="\n")

# %% [markdown]
# ## Hidden states
#
# `hidden_states` returns the states of every token and a boolean mask, arrays of the
# backend on its device. `pad_to` gives them a fixed length, so that one program is
# compiled, however long the texts are. An empty text is allowed: a row of padding, with
# states of 0. Generators use it for guidance.

# %%
LENGTH = 24
embedder = keras_t5gemma.TextEmbedder.from_preset("t5gemma_mini_synopsis")
states, mask = embedder.hidden_states([captions[0], ""], pad_to=LENGTH)
print("states", tuple(states.shape), "tokens", ops.convert_to_numpy(mask).sum(axis=1))

# %% [markdown]
# Layers are numbered as in transformers: 0 are the embeddings, -1 the last states.
# Which layer serves a generator best is worth trying. A list of layers takes one pass.

# %%
(first, last), _ = embedder.hidden_states(captions[:2], layers=[1, -1], pad_to=LENGTH)
print("two layers:", tuple(first.shape), tuple(last.shape))

# %% [markdown]
# The encoder stays frozen here, so the states of all captions are computed once, before
# the training. `as_numpy=True` keeps them on the host, where they do not fill the
# memory of the accelerator.

# %%
states, mask = embedder.hidden_states([*captions, ""], pad_to=LENGTH, as_numpy=True)
WIDTH = states.shape[-1]
print(f"{states.nbytes / 1e6:.1f} MB of states")

# %% [markdown]
# ## A generator
#
# A small rectified flow (arXiv 2209.03003): the model sees a mixture of a drawing and
# noise and predicts the drawing. Eight learned queries attend to the states of the
# caption. Any Keras model takes the states in this way.

# %%
PIXELS = SIZE * SIZE * 3


def make_generator(dim=192, queries=8):
    """Noisy drawing, time, states and mask -> the drawing."""
    noisy = keras.Input((PIXELS,), name="noisy")
    time = keras.Input((1,), name="time")
    text = keras.Input((None, WIDTH), name="states")
    keep = keras.Input((None,), dtype="bool", name="mask")
    memory = layers.LayerNormalization()(text)
    scores = layers.Dense(queries)(memory)  # Of every token, for each query.
    scores = ops.where(keep[:, :, None], scores, -1e4)
    weights = ops.softmax(scores, axis=1)
    read = ops.einsum("ntq,ntd->nqd", weights, memory)
    read = layers.Dense(dim)(ops.reshape(read, (-1, queries * WIDTH)))
    x = layers.Dense(dim)(ops.concatenate([noisy, time], -1))
    for _ in range(3):
        y = ops.concatenate([layers.LayerNormalization()(x), read, time], -1)
        x = x + layers.Dense(dim)(layers.Dense(2 * dim, "gelu")(y))
    outputs = layers.Dense(PIXELS)(layers.LayerNormalization()(x))
    return keras.Model([noisy, time, text, keep], outputs, name="generator")


generator = make_generator()
print(f"{generator.count_params():,} parameters")

# %% [markdown]
# In one of ten steps the caption is replaced by the empty text, so that the generator
# also learns to paint without one.

# %%
STEPS, BATCH = 2000, 64
rng = np.random.default_rng(0)
pixels = images.reshape(len(images), -1)
schedule = keras.optimizers.schedules.CosineDecay(2e-3, STEPS)
generator.compile(keras.optimizers.AdamW(schedule), "mse")
losses = []
for _ in range(STEPS):
    chosen = rng.choice(train, BATCH)
    rows = chosen * len(PHRASES) + rng.integers(len(PHRASES), size=BATCH)
    rows[rng.random(BATCH) < 0.1] = len(captions)  # The empty text.
    noise = rng.normal(size=(BATCH, PIXELS)).astype("float32")
    time = rng.random((BATCH, 1)).astype("float32")
    noisy = (1 - time) * noise + time * pixels[chosen]
    inputs = [noisy, time, states[rows], mask[rows]]
    losses.append(float(generator.train_on_batch(inputs, pixels[chosen])))
print(f"loss: {np.mean(losses[:50]):.3f} first, {np.mean(losses[-50:]):.3f} last")

# %% [markdown]
# ## Painting
#
# From noise to a drawing in twelve steps. Guidance (arXiv 2207.12598) moves away from
# what the generator would paint without a caption. How often is the nearest of all 120
# drawings the right one?


# %%
def paint(states, mask, guidance=1.5, steps=12):
    """Drawings of captions by their states, `(N, 10, 10, 3)`."""
    count = len(states)
    x = np.random.default_rng(1).normal(size=(count, PIXELS))
    both = [np.concatenate([s, 0 * s]) for s in (states, mask)]
    for i in range(steps):
        time = np.full((2 * count, 1), i / steps, "float32")
        inputs = [np.concatenate([x, x]).astype("float32"), time, *both]
        inputs[-1] = inputs[-1].astype(bool)
        with_text, without = np.split(generator.predict_on_batch(inputs), 2)
        drawing = without + guidance * (with_text - without)
        x = x + (drawing - x) / (steps - i)
    return x.reshape(-1, SIZE, SIZE, 3)


def right(painted, numbers):
    """Share of drawings whose nearest drawing is the right one, in percent."""
    distances = ((painted[:, None] - images[None]) ** 2).sum((2, 3, 4))
    return 100 * np.mean(distances.argmin(1) == numbers)


unseen = held_out * len(PHRASES)
painted = paint(states[unseen], mask[unseen])
some = train[:40]
known = right(paint(states[some * len(PHRASES)], mask[some * len(PHRASES)]), some)
print(f"right: {known:.0f} % of known, {right(painted, held_out):.0f} % of held-out")

# %%
# %matplotlib inline
from matplotlib.figure import Figure  # noqa: E402

figure = Figure(figsize=(8, 4.4), layout="constrained")
for axes, row, image in zip(figure.subplots(2, 4).flat, unseen, painted, strict=False):
    axes.imshow(np.clip((image + 1) / 2, 0, 1))
    axes.set_title(captions[row], fontsize=7)
    axes.axis("off")
figure.savefig(RUN / "painted.png", dpi=120)
figure

# %% [markdown]
# ## One model
#
# `TextTower` is the same function as a layer: token ids and mask in, states out. Joined
# with the generator it is one Keras model, compiled, trained and saved as such, with
# its tokenizer. The tower is frozen unless `trainable=True`; then `fit` trains through
# it, all weights or the adapters of `tower.backbone.enable_lora(8)`.

# %%
tower = keras_t5gemma.TextTower(embedder.backbone, embedder.preprocessor)
noisy, time = generator.input[:2]
ids = keras.Input((None,), dtype="int32", name="ids")
keep = keras.Input((None,), dtype="bool", name="keep")
model = keras.Model(
    [noisy, time, ids, keep], generator([noisy, time, tower(ids, keep), keep])
)
model.save(RUN / "painter.keras")
loaded = keras.saving.load_model(RUN / "painter.keras")

(again,) = [x for x in loaded.layers if isinstance(x, keras_t5gemma.TextTower)]
texts = [captions[row] for row in unseen[:4]]
inputs = [pixels[:4], np.full((4, 1), 0.5, "float32")]
found = loaded.predict_on_batch([*inputs, *again.tokenize(texts, pad_to=LENGTH)])
rows = unseen[:4]
expected = generator.predict_on_batch([*inputs, states[rows], mask[rows]])
print("loaded model agrees:", np.allclose(found, expected, atol=1e-4))
trained = len(loaded.trainable_weights) == len(generator.trainable_weights)
print("only the generator is trained:", trained)

# %% [markdown]
# ## Recipes
#
# The calls that reproduce what others take from T5Gemma's encoder. `embedder` is a
# `TextEmbedder.from_preset(checkpoint)`, which reads the encoder alone; no special
# tokens are added, and padding is on the right.
#
# | used by | call |
# |---|---|
# | Stable Audio 3 (B-B, UL2) | `hidden_states([prompt, ""], pad_to=256)` |
# | PRX in diffusers (2B-2B, UL2) | the same; the mask is boolean |
# | MagiHuman, FastVideo (9B-9B, UL2) | `hidden_states(prompts, pad_to=512)` |
# | the same in half precision | `..., dtype="float16")` on bfloat16 weights |
# | ComfyUI adapters (2B encoder) | `hidden_states(prompts, pad_to=maximum)` |
# | Breeze TTS 2, chosen layers | `hidden_states(texts, layers=[1, -1])` |
# | an encoder in a subfolder | `TextEmbedder.from_preset(..., subfolder="t5gemma")` |
# | classifiers | `TextClassifier.from_preset(checkpoint, class_names=names)` |
#
# `layers=[-2], final_norm=True` normalizes the states before the last block, and
# `dtype="int8"` or `"int4"` in `from_preset` quantizes the tower. A text longer than
# `pad_to` is cut, with a warning; `pad_to` may be up to the model's 8,192 positions,
# unless the preprocessor has a smaller `encoder_sequence_length`.
#
# ## Larger models
#
# Only the encoder counts. In bfloat16 a parameter is 2 bytes.
#
# **2B-2B on one GPU** (`t5gemma_2b_2b_ul2`, 5.6 billion parameters, 2.6 of them the
# encoder's): 2.6 x 2 = 5.2 GB for a frozen tower, half of it with `dtype="int8"`. Its
# states of a prompt of 256 tokens are 256 x 2304 x 2 = 1.2 MB, those of a million
# prompts 1.2 TB: then compute them while training, with the tower in front.
#
# ```python
# tower = keras_t5gemma.TextTower.from_preset("t5gemma_2b_2b_ul2", dtype="bfloat16")
# ```
#
# **9B-2B** (`t5gemma_9b_2b_ul2`, 12.3 billion parameters, 9.2 of them the encoder's):
# 18 GB frozen. The decoder is never read, so the pair with the smallest decoder is as
# good a source as any.

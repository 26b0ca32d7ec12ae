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
# # Adapt Gemma 2 into T5Gemma
#
# What this shows: decoder-only Gemma 2 in, an encoder-decoder out. First a balanced
# pair, one Gemma 2 on both sides, then a large one that reads and a small one that
# writes; what is checked on the way; and that the result learns faster than a model
# that starts from nothing (arXiv 2504.06225).
#
# Real Gemma 2 is gigabytes, so this guide makes two small ones with KerasHub and trains
# them for a minute. Everything after that is the same for the real ones; the last
# section says what to write in their place.
#
# Time on two processor cores: about 2 minutes.

# %% tags=["skip-execution"]
# On a hosted notebook service such as Colab or Kaggle:
# %pip install -q "keras-t5gemma[jax]" grain
# %pip install -q --no-deps "keras-hub>=0.32" regex
# %env KERAS_BACKEND=jax

# %%
import inspect
from importlib import import_module
from pathlib import Path

import keras
import keras_hub
import numpy as np

import keras_t5gemma

keras.utils.set_random_seed(0)
RUN = Path("runs/adapt")
RUN.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## Some text
#
# What Python says of itself: the documentation inside its standard library.

# %%
MODULES = (
    "argparse collections csv datetime decimal email functools http itertools json"
)
MODULES += " logging pathlib random statistics string subprocess tarfile threading"


def documents():
    """Docstrings of some modules and of what is in them, each once."""
    found = {}
    for name in MODULES.split():
        module = import_module(name)
        parts = [module, *vars(module).values()]
        parts += [v for p in parts if inspect.isclass(p) for v in vars(p).values()]
        for part in parts:
            doc = getattr(part, "__doc__", None)
            if isinstance(doc, str) and len(doc) > 200:
                found[inspect.cleandoc(doc)] = None
    return list(found)


texts = documents()
train, held_out = texts[20:], texts[:20]
print(len(texts), "documents,", sum(map(len, texts)), "characters")

# %% [markdown]
# ## Two decoder-only models
#
# A KerasHub preset of Gemma 2 is a folder with weights and, in `assets/tokenizer`, its
# vocabulary. These two use the vocabulary of the preset inside this package.

# %%
tokenizer = keras_t5gemma.Tokenizer.from_preset("t5gemma_mini_synopsis")


def make_gemma2(name, width, layers, steps):
    """Train a small Gemma 2 on the documents, and write it as a KerasHub preset."""
    backbone = keras_hub.models.GemmaBackbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        num_layers=layers,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=width,
        intermediate_dim=6 * width,
        head_dim=16,
        query_head_dim_normalize=True,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        attention_logit_soft_cap=50.0,
        final_logit_soft_cap=30.0,
        use_sliding_window_attention=True,
        sliding_window_size=4096,
    )
    ids = []
    for row in tokenizer.tokenize(train):
        ids += [tokenizer.start_token_id, *row, tokenizer.end_token_id]
    ids = np.resize(np.array(ids, "int32"), (steps * 8, 65))
    model = keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=None)
    model.compile(
        optimizer=keras.optimizers.Adam(4e-3, global_clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones_like(ids[:, :-1])}
    history = model.fit(x, ids[:, 1:], batch_size=8, shuffle=False, verbose=0)
    print(f"{name}: {model.count_params():,} parameters", end=", ")
    print(f"loss {history.history['loss'][0]:.2f} over {steps} steps")
    backbone.save_to_preset(str(RUN / name))
    assets = RUN / name / "assets/tokenizer"
    assets.mkdir(parents=True, exist_ok=True)
    (assets / "vocabulary.spm").write_bytes(tokenizer.proto)
    return str(RUN / name)


small = make_gemma2("gemma2_small", width=48, layers=2, steps=60)
large = make_gemma2("gemma2_large", width=64, layers=3, steps=60)

# %% [markdown]
# ## A balanced pair
#
# The encoder gets the Gemma 2 as it is, and will look both ways. The decoder gets it
# too, with cross-attention added to every layer: a copy of the layer's self-attention.
# The command works from file to file with one tensor in memory, and checks its result:
# with a causal mask the encoder is the source again, and without its cross-attention
# the decoder is.

# %%
from keras_t5gemma.cli.main import main  # noqa: E402

balanced = str(RUN / "t5gemma_small_small")
assert main(["adapt", small, "--output", balanced, "--overwrite"]) == 0

# %% [markdown]
# In a shell that is `keras-t5gemma adapt SMALL --output FOLDER`. In Python
# `keras_t5gemma.adapt_gemma2(small)` gives the backbone without writing anything.
#
# ## It learns faster than from nothing
#
# Out of the box it writes nonsense: its encoder never looked ahead, its decoder never
# saw another's states. It needs further pretraining on plain text, out of which an
# objective makes the pairs. Here a few steps with `PrefixLM`, and the same steps for a
# model of the same shape that starts from nothing.


# %%
def continue_training(backbone, steps=40, callbacks=()):
    """Train; say what the loss on the held-out documents was and is."""
    keras.utils.set_random_seed(0)
    preprocessor = keras_t5gemma.Seq2SeqLMPreprocessor(
        tokenizer, 64, 64, objective=keras_t5gemma.objectives.PrefixLM()
    )
    model = keras_t5gemma.Seq2SeqLM(backbone, preprocessor)
    model.compile(optimizer=keras.optimizers.Adam(2e-3, global_clipnorm=1.0))
    before = model.evaluate(held_out, batch_size=8, return_dict=True, verbose=0)
    options = {"batch_size": 8, "steps_per_epoch": steps, "verbose": 0}
    model.fit(train, callbacks=list(callbacks), **options)
    after = model.evaluate(held_out, batch_size=8, return_dict=True, verbose=0)
    return f"{before['loss']:.2f} before, {after['loss']:.2f} after"


adapted = keras_t5gemma.Backbone.from_preset(balanced)
scratch = keras_t5gemma.Backbone(adapted.config)
adapted_losses = continue_training(adapted)
scratch_losses = continue_training(scratch)
print("adapted:", adapted_losses)
print("scratch:", scratch_losses)

# %% [markdown]
# ## A large one that reads, a small one that writes
#
# Reading is cheap, all tokens at once; writing is not. So the encoder may be the larger
# one. Its cross-attention then has nothing to be copied from and starts at random:
# that is trained first, alone, here for 10 steps. The paper takes 1,000.

# %%
unbalanced = keras_t5gemma.adapt_gemma2(large, small)
print("needs a warm-up:", unbalanced.lineage["needs_warm_up"])
warm_up = keras_t5gemma.callbacks.CrossAttentionWarmUp(steps=10)
losses = continue_training(unbalanced, callbacks=[warm_up])
print("large reads, small writes:", losses)

# %% [markdown]
# ## Real Gemma 2
#
# Only the names change:
#
# ```bash
# keras-t5gemma adapt gemma2_2b_en --output t5gemma_2b_2b
# keras-t5gemma adapt gemma2_9b_en gemma2_2b_en --output t5gemma_9b_2b
# ```
#
# The sources are KerasHub's presets (`gemma2_2b_en`, `gemma2_9b_en`, the instruction
# tuned ones too), or folders of KerasHub's or transformers', your own fine-tunes among
# them. Adapting needs the disk for the result and the memory for one tensor, the
# embedding: 1.2 GB for 2B in bfloat16, 1.8 GB for 9B.
#
# **2B-2B on one GPU.** 5.6 billion parameters: 11 GB in bfloat16. To continue their
# training with Adafactor needs about 11 GB of weights, 11 GB of gradients and little
# more: 40 GB with the activations of a few thousand tokens, with
# `compile(rematerialize=True)`. The published checkpoints saw up to two trillion
# tokens; a domain of your own wants millions.
#
# **9B-2B.** 12.3 billion parameters: 25 GB in bfloat16, 49 GB with gradients: one GPU
# of 80 GB. Its cross-attention is random, so `keras-t5gemma pretrain` trains that alone
# for the first 1,000 steps without being asked to.
#
# The guide *continue_pretraining* continues from here.

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
# # Generate
#
# What this shows: text in, text out, in the ways you may want it. Greedy search, beams,
# sampling, streaming, the score of a given answer, several prompts for one source, and
# int8 weights.
#
# It uses the preset inside the package: 6 million parameters, trained to shorten the
# description of a Debian package to one line. No network is needed. The last section
# says what changes for the published models.
#
# Time on two processor cores: about 1 minute.
#
# Choose the backend with the environment variable `KERAS_BACKEND` (`jax`, `tensorflow`
# or `torch`) before Python starts.

# %% tags=["skip-execution"]
# On a hosted notebook service such as Colab or Kaggle:
# %pip install -q "keras-t5gemma[jax]" matplotlib
# %env KERAS_BACKEND=jax

# %%
from pathlib import Path

import keras

import keras_t5gemma

keras.utils.set_random_seed(0)
Path("runs").mkdir(exist_ok=True)
model = keras_t5gemma.Seq2SeqLM.from_preset("t5gemma_mini_synopsis")
print(f"{model.count_params():,} parameters on {keras.config.backend()}")

# %% [markdown]
# Our texts. `generate` takes one string or thousands of them. It sorts them by length,
# decodes them in batches and returns the answers in order.

# %%
texts = [
    "This library reads and writes JSON files. It is written in C.",
    "This package provides a small command line program that converts images between "
    "many formats, among them PNG, JPEG and TIFF. It can also resize them.",
    "A game of chess for two players, or for one player against the computer. It has "
    "a clock, takes moves back, and saves games to a file.",
    "This package contains the documentation of the mail server: a guide for the "
    "administrator, a list of all settings and a few examples.",
]

# %% [markdown]
# ## Greedy search and beams
#
# Greedy search takes the likeliest token at each step. Beam search keeps the best few
# beginnings. A small model may fall into loops, most often with greedy search. The
# preset's `generation_config.json` forbids them: `no_repeat_ngram_size=2` and
# `repetition_penalty=1.5` are its defaults, which arguments override.

# %%
print(model.generation_defaults)
greedy = model.generate(texts)
beams = model.generate(texts, num_beams=4)
loops = model.generate(texts, no_repeat_ngram_size=0, repetition_penalty=1.0)
for row in zip(texts, greedy, beams, loops, strict=True):
    names = ("text", "greedy", "4 beams", "may loop")
    for name, value in zip(names, row, strict=True):
        print(f"{name:>9}: {value}")
    print()

# %% [markdown]
# `num_return_sequences` returns more than one beam, `return_scores` says how likely
# each is. Log-probabilities are natural logarithms, of the whole answer.

# %%
several = model.generate(
    texts[0], num_beams=4, num_return_sequences=3, return_scores=True
)
for answer, log_prob in zip(several["text"], several["log_prob"], strict=True):
    print(f"{log_prob:8.2f}  {answer}")

# %% [markdown]
# ## Sampling
#
# `temperature`, `top_k` or `top_p` turn sampling on. With a `seed` the answer to a row
# is always the same, whatever else is in the batch.

# %%
for seed in range(3):
    print(model.generate(texts[1], temperature=0.7, top_p=0.9, seed=seed))
again = model.generate([texts[0], texts[1]], temperature=0.7, top_p=0.9, seed=0)
first = model.generate(texts[0], temperature=0.7, top_p=0.9, seed=0)
print("same answer alone and in a batch:", first == again[0])

# %% [markdown]
# ## Streaming
#
# `stream` yields pieces of text as they are written. A character that is made of
# several tokens comes when it is whole.

# %%
pieces = []
for piece in model.stream(texts[2]):
    pieces.append(piece)
    print(piece, end="", flush=True)
print(f"\n({len(pieces)} pieces)")

# %% [markdown]
# ## Scoring
#
# `score` says how likely a given target is. That ranks candidates, or finds rows of a
# data set that do not belong together. Longer targets have more tokens to get wrong:
# divide by their number to compare.

# %%
candidates = [
    "library to read and write JSON files",
    "chess game",
    "documentation of a mail server",
]
scores = model.score([texts[0]] * len(candidates), candidates)
per_token = [
    log_prob / len(ids)
    for log_prob, ids in zip(scores["log_prob"], scores["token_ids"], strict=True)
]
for candidate, value in zip(candidates, per_token, strict=True):
    print(f"{value:6.2f} a token  {candidate}")
best = candidates[per_token.index(max(per_token))]
print("best candidate:", best)

# %% [markdown]
# ## Several prompts for one source
#
# A prompt is the beginning of the answer. With one source and a list of prompts the
# encoder reads the source only once.

# %%
prompts = ["library to", "tool that", "C code for"]
answers = model.generate({"encoder_text": texts[0], "decoder_text": prompts})
for answer in answers:
    print(answer)

# %% [markdown]
# ## How long are they?
#
# The answers have a few tokens, whatever the length of the source.

# %%
# %matplotlib inline
from matplotlib.figure import Figure  # noqa: E402

tokenize = model.preprocessor.tokenizer.tokenize
lengths = {
    "source": [len(ids) for ids in tokenize(texts)],
    "greedy": [len(ids) for ids in tokenize(greedy)],
    "4 beams": [len(ids) for ids in tokenize(beams)],
}
for name, values in lengths.items():
    print(f"{name:>8}: {values} tokens")
figure = Figure(figsize=(6, 3), layout="constrained")
axes = figure.add_subplot()
for i, (name, values) in enumerate(lengths.items()):
    axes.bar([j + 0.27 * i for j in range(len(texts))], values, 0.25, label=name)
axes.set_xticks([j + 0.27 for j in range(len(texts))], range(1, len(texts) + 1))
axes.set_xlabel("text")
axes.set_ylabel("tokens")
axes.legend()
figure.savefig("runs/lengths.png", dpi=120)
figure

# %% [markdown]
# ## int8
#
# `quantize` makes the weights four times smaller than float32. It changes the model you
# have; load the preset again for the old one.


# %%
def megabytes(model):
    """Of all weights as they are held."""
    sizes = {"float32": 4, "int32": 4, "bfloat16": 2, "int8": 1}
    return (
        sum(
            sizes[keras.backend.standardize_dtype(v.dtype)] * keras.ops.size(v)
            for v in model.weights
        )
        / 1e6
    )


before = megabytes(model)
model.quantize("int8")
after = megabytes(model)
print(f"{before:.1f} MB in float32, {after:.1f} MB in int8")
int8 = model.generate(texts, num_beams=4)
for old, new in zip(beams, int8, strict=True):
    print(f"float32: {old}\n   int8: {new}\n")

# %% [markdown]
# ## Several tokens a pass
#
# Speculative decoding proposes a few tokens, and verifies them in one pass of the
# decoder. The answers are the same, token for token, greedy or sampled with a `seed`;
# up to rounding in bfloat16 and int8, as with another batch size. Tokens are proposed
# in two ways:
#
# - `generate(texts, speculate="source")` copies what followed the last tokens in the
#   source, or in the answer: for corrections, extracts, and translations of names or
#   code.
# - `generate(texts, draft=small)` asks a smaller model of the same vocabulary, e.g.
#   `small = Seq2SeqLM.from_preset("t5gemma_s_s_prefixlm_it")` for a 2B-2B model.
#
# How many tokens are proposed follows what is accepted, down to none where it does not
# pay. A model as small as this one gains nothing: its decoder takes less time than the
# bookkeeping.

# %% [markdown]
# ## Larger models
#
# Change the name in `from_preset`. `keras_t5gemma.presets()` lists all names.
#
# **2B-2B on one GPU.** `from_preset("t5gemma_2b_2b_prefixlm_it", dtype="bfloat16")`.
# It has 5.6 billion parameters, 2 bytes each: 5.6 x 2 = 11.2 GB, so a card of 16 GB
# does. With `quantize("int8")` it is 5.6 GB. The cache of a row is small in comparison:
# keys and values of 26 layers, 4 heads x 256 numbers x 2 bytes, are 26 x 2 x 2,048
# bytes = 0.1 MB for each token of the source and each of the answer. A row of 512 + 512
# tokens takes 0.11 GB, eight such rows 0.9 GB.
#
# **9B-2B.** `from_preset("t5gemma_9b_2b_prefixlm_it", dtype="bfloat16")`. 12.3 billion
# parameters: 12.3 x 2 = 24.6 GB, a card of 40 GB, or 12.3 GB in int8. The 9B encoder
# reads, once; writing costs what the 2B decoder costs. That makes it a good choice for
# long sources with short answers.
#
# The instruction-tuned presets (`_it`) expect turns around the text. `from_preset`
# knows that by their name and puts them there (`template="instruction"`).
#
# On the command line: `keras-t5gemma generate --preset NAME --sampler beam "A text"`,
# with `--speculate source` or `--draft NAME` for several tokens a pass.

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
# # From the published checkpoint to your task
#
# What this shows: the whole way with T5Gemma B-B on one GPU. Does it fit, does it load,
# how good is it on your task as it is, fine-tune it, compare, save, make it small, use
# it from a shell and from transformers.
#
# The published weights are 1.2 GB and need a login. Without `GUIDE_PRESET` in the
# environment this guide takes the preset inside the package, so that every cell runs
# anywhere, and the numbers below are those of that small model. With
# `GUIDE_PRESET=t5gemma_b_b_prefixlm_it` the same cells run on the published one.
#
# Time on two processor cores: about 2 minutes.

# %% tags=["skip-execution"]
# On a hosted notebook service such as Colab or Kaggle:
# %pip install -q "keras-t5gemma[jax,finetune]"
# %env KERAS_BACKEND=jax

# %%
import os
import subprocess
import sys
from pathlib import Path

import keras

import keras_t5gemma

keras.utils.set_random_seed(0)
PRESET = os.environ.get("GUIDE_PRESET", "t5gemma_mini_synopsis")
PUBLISHED = "t5gemma_b_b_prefixlm_it"
RUN = Path("runs/published")
RUN.mkdir(parents=True, exist_ok=True)
print(f"{PRESET} on {keras.config.backend()}")

# %% [markdown]
# ## Access, once
#
# Accept the Gemma licence on the page of the model, on Hugging Face
# (`google/t5gemma-b-b-prefixlm-it`) or on Kaggle (`keras/t5-gemma`), and log in:
#
# ```bash
# hf auth login
# ```
#
# For Kaggle set `KAGGLE_USERNAME` and `KAGGLE_KEY`, and pass
# `kaggle://keras/t5-gemma/keras/t5gemma_b_b_prefixlm_it/1` as the preset. A folder that
# was downloaded by other means works too. What the names stand for is known without
# network:

# %%
for row in keras_t5gemma.presets():
    if row.name in ("t5gemma_mini_synopsis", PUBLISHED):
        print(f"{row.name}: {row.parameters / 1e6:,.0f} million parameters")
        print(f"  {row.description}")

# %% [markdown]
# ## Does it fit?
#
# `plan` computes the memory of a training step from the configuration; nothing is
# downloaded. For B-B, sources of 512 tokens and targets of 128 on a card of 16 GB:
# all weights with AdamW, then LoRA, for several batches.

# %%
ways = {"all weights": {}, "LoRA of rank 16": {"lora_rank": 16}}
for batch in (8, 32):
    for name, options in ways.items():
        found = keras_t5gemma.plan(
            PUBLISHED,
            devices=1,
            memory="16GB",
            batch=batch,
            length=(512, 128),
            **options,
        )
        verdict = "fits" if found.fits else "does not fit"
        print(f"batch {batch:2}, {name}: {found.total / 1e9:5.1f} GB, {verdict}")

# %% [markdown]
# Leave some room for the framework. `keras-t5gemma plan` prints all parts of the sum.
#
# ## Load
#
# `mixed_bfloat16` keeps float32 weights and computes in bfloat16: right for training on
# a GPU. A processor computes in float32, which is the default.
#
# The published `_it` checkpoints expect the turns of a conversation around the text.
# `from_preset` knows that by their names.

# %%
dtype = None if PRESET == "t5gemma_mini_synopsis" else "mixed_bfloat16"
model = keras_t5gemma.Seq2SeqLM.from_preset(PRESET, dtype=dtype)
model.preprocessor.encoder_sequence_length = 512
model.preprocessor.decoder_sequence_length = 128
print(f"{model.count_params():,} parameters")

# %% [markdown]
# ## Your task
#
# Here: commit messages, from a description of the change. Pairs in a JSONL file, one
# object a line with `source` and `target`; `GUIDE_DATA=pairs.jsonl` takes yours. What
# is held out is never trained on.

# %%
PAIRS = """
The parser now accepts comments that end at the end of the file without a line break. => fix: comments at the end of a file
A new option lets users choose the color of the terminal output. => feat: option for colors
The manual explains how to install the program on a server. => docs: installation on a server
The tests of the network code no longer need a connection. => test: network without a connection
Reading a large file takes half the memory it took before. => perf: half the memory for large files
The program crashed when the folder was empty. It now prints a message. => fix: crash for an empty folder
Users can search in the list of packages by name. => feat: search packages by name
A page describes all settings and their default values. => docs: settings and defaults
There are tests for dates before 1970. => test: dates before 1970
Sorting the table is three times faster for long lists. => perf: faster sorting of long lists
The clock showed the wrong hour in summer. => fix: hour of the clock in summer
The game can be saved and loaded. => feat: save and load games
The tutorial has a chapter about sound. => docs: chapter about sound
Broken images are part of the tests now. => test: broken images
The index of the archive is read once, not for each file. => perf: read the index once
Letters with accents were sorted after z. They are now in their places. => fix: order of letters with accents
The server answers requests over an encrypted connection. => feat: encrypted connections
The reference lists every function of the library with an example. => docs: example for every function
The tests run on two versions of the compiler. => test: two versions of the compiler
Starting the program takes a second less, because fonts are loaded later. => perf: load fonts later
The last line of a table was lost when it was exported. => fix: last line of exported tables
Images can be turned and mirrored. => feat: turn and mirror images
The guide for developers says how to build the program. => docs: how to build the program
A test compares the results with those of the old program. => test: results of the old program
The search in long texts uses an index and needs less time. => perf: index for searches in long texts
The mail reader forgot the password after a restart. => fix: password after a restart
The file manager shows small pictures of documents. => feat: small pictures of documents
The manual has an index and a list of all commands. => docs: index and list of commands
"""  # noqa: E501
VALID_ROWS = 8

if "GUIDE_DATA" in os.environ:
    pairs = keras_t5gemma.read_pairs(os.environ["GUIDE_DATA"])
else:
    rows = [line.split(" => ") for line in PAIRS.strip().splitlines()]
    sources, targets = zip(*rows, strict=True)
    pairs = {"encoder_text": list(sources), "decoder_text": list(targets)}
train = {name: column[:-VALID_ROWS] for name, column in pairs.items()}
valid = {name: column[-VALID_ROWS:] for name, column in pairs.items()}
print(len(train["encoder_text"]), "pairs to learn,", VALID_ROWS, "to check")

# %% [markdown]
# ## Before
#
# Measure first: an instruction in front of the text may be all that your task needs.
# `score` tells how likely the right answers are, `generate` what the model writes.


# %%
def measure(model):
    """Print scores on the held-out pairs; return the answers."""
    answers = model.generate(valid["encoder_text"], num_beams=4, max_length=32)
    rouge = keras_t5gemma.score_texts(answers, valid["decoder_text"], ["rouge"])
    scores = model.score(valid["encoder_text"], valid["decoder_text"])
    tokens = sum(map(len, scores["token_ids"]))
    mean, error = rouge["rougeL"]["mean"], rouge["rougeL"]["standard_error"]
    print(f"ROUGE-L {mean:.1f} ± {error:.1f}", end=", ")
    print(f"{-sum(scores['log_prob']) / tokens:.2f} nats per token of the targets")
    return answers


before = measure(model)
for source, answer in zip(valid["encoder_text"][:3], before, strict=False):
    print(f"  {source}\n    {answer}")

# %% [markdown]
# ## Fine-tune
#
# With LoRA the base stays as it is and the optimizer's state is small, so that B-B fits
# many times over. `rematerialize=True` trades time for memory. `SaveBest` keeps the
# epoch with the lowest validation loss; `fit` stops at a NaN and reports truncation.

# %%
model.enable_lora(16, parts=["encoder", "decoder", "cross_attention", "mlp"])
rate = 3e-3 if PRESET == "t5gemma_mini_synopsis" else 3e-4
model.compile(
    optimizer=keras.optimizers.AdamW(rate, beta_2=0.98, global_clipnorm=1.0),
    rematerialize=True,
)
history = model.fit(
    train,
    validation_data=valid,
    batch_size=4,
    epochs=8,
    callbacks=[keras_t5gemma.callbacks.SaveBest(RUN / "best")],
    verbose=2,
)

# %%
# %matplotlib inline
keras_t5gemma.plot_history(history, RUN / "curves.png")

# %% [markdown]
# ## After
#
# The saved preset has the adapters merged into the weights. Eight rows are few: look at
# the standard error before you believe a difference.

# %%
best = keras_t5gemma.Seq2SeqLM.from_preset(RUN / "best", dtype=dtype)
after = measure(best)
for row in zip(valid["decoder_text"], before, after, strict=True):
    for name, text in zip(("wanted", "before", "after"), row, strict=True):
        print(f"{name:>7}: {text}")
    print()

# %% [markdown]
# ## Use it
#
# Anywhere that the package is installed, from a shell. On JAX
# `--compilation-cache FOLDER` keeps the compiled programs for the next start.

# %%
command = [sys.executable, "-m", "keras_t5gemma.cli", "generate"]
command += ["--preset", str(RUN / "best"), "--num-beams", "4"]
command += ["The button to print was too small on phones. It is larger now."]
done = subprocess.run(command, capture_output=True, text=True, check=True)
print(done.stdout.strip())

# %% [markdown]
# Smaller, for generation only: int8 weights take a quarter of float32's memory. Check
# the quality again, it is measured in a few lines.

# %%
best.quantize("int8")
int8 = measure(best)
print(f"same answers as before quantization: {sum(map(str.__eq__, int8, after))} of 8")

# %% [markdown]
# For programs that use transformers: a folder for its `from_pretrained`. `verify`
# compares two checkpoints, tensor by tensor, and their logits.

# %%
keras_t5gemma.convert(RUN / "best", RUN / "transformers", to="transformers")
found = keras_t5gemma.verify(RUN / "best", RUN / "transformers")
print("files:", ", ".join(sorted(p.name for p in (RUN / "transformers").iterdir())))
print("same tensors and logits:", found.within(1e-5))

# %% [markdown]
# ## Larger models
#
# The same cells, another name.
#
# **2B-2B on one GPU** (`t5gemma_2b_2b_prefixlm_it`, 5.6 billion parameters): LoRA on
# weights in `dtype="bfloat16"` takes 5.6 x 2 = 11 GB and about 2 GB for a step, in
# `mixed_bfloat16` 5.6 x 4 = 22 GB.
#
# **9B-2B** (`t5gemma_9b_2b_prefixlm_it`, 12.3 billion parameters): 12.3 x 2 = 25 GB in
# bfloat16, 12.3 GB with `model.quantize("int8")` before `enable_lora`.
#
# Which preset, data type and batch fit your card is a table of the documentation,
# *Recipes by memory*. For real runs use `keras-t5gemma finetune`: it resumes after an
# interruption and writes scores, curves and a model card.

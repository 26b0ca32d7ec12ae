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
# # Fine-tune for summarization
#
# What this shows: pairs of texts and summaries in, a better model out. It measures
# before and after, keeps the best epoch, can be stopped and started again, draws the
# curves and ends in a folder to share, with a model card.
#
# The preset inside the package already shortens descriptions of Debian packages. Here
# it learns a house style: every summary starts with what kind of thing it is, `tool:`,
# `library:`, `game:`, `font:` or `docs:`. A few dozen pairs are enough for that. The
# last sections say what changes with your own data and with the published models.
#
# Time on two processor cores: about 1 minute.

# %% tags=["skip-execution"]
# On a hosted notebook service such as Colab or Kaggle:
# %pip install -q "keras-t5gemma[jax,finetune]"
# %env KERAS_BACKEND=jax

# %%
import os
from pathlib import Path

import keras

import keras_t5gemma

keras.utils.set_random_seed(0)
RUN = Path("runs/summarization")
RUN.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## The data
#
# Written by hand for this guide. With `GUIDE_DATA=pairs.jsonl` in the environment the
# guide takes your file in its place: one object a line, with the fields `source` and
# `target`. CSV and Parquet work too, see `read_pairs`.

# %%
PAIRS = """
This program renames many files at once. You give it a pattern and it shows the new names before it changes anything. => tool: rename many files at once
A small library that reads and writes INI files. It keeps comments and the order of the entries. => library: read and write INI files
Guide a penguin over melting ice. Each level has more holes and less time. The game has fifty levels and an editor. => game: guide a penguin over ice
A typeface with serifs, made for long texts on paper. It comes in four weights, each with italics. => font: serif typeface for long texts
This package holds the manual of the calendar server, as HTML pages. It explains how to install and configure it. => docs: manual of the calendar server
It watches a folder and sends every new file to another computer. The connection is encrypted. => tool: send new files to another computer
Functions for matrices and vectors, written in C. It uses the vector instructions of the processor where there are any. => library: matrices and vectors in C
Two players place stones on a board of nineteen lines. Who surrounds more space wins. You can play against the computer. => game: place stones on a board
Letters that look like handwriting with a brush. The font covers Latin and Greek. => font: brush handwriting for Latin and Greek
The reference of the query language, with an example for each command. It is one PDF file. => docs: reference of the query language
This tool measures how fast a disk reads and writes. It prints a table for blocks of different sizes. => tool: measure the speed of a disk
This module for Python parses dates that people write, such as next Friday. It knows eleven languages. => library: parse dates in Python
You drive a train through the mountains and have to stop at each station in time. Routes can be drawn by yourself. => game: drive a train through mountains
A font of one width for programmers. Zero and the letter O are easy to tell apart. => font: one width for programmers
Tutorial for the drawing program in six lessons, with the pictures that are needed for them. => docs: tutorial for the drawing program
It finds files that are there twice and offers to delete one of them. It compares contents, not names. => tool: find files that are there twice
A library to draw charts in web pages. It makes lines, bars and pies and needs no server. => library: draw charts in web pages
A puzzle with coloured blocks that fall from the sky. Three of one colour vanish. It can be played by two over a network. => game: puzzle with falling blocks
This font has musical symbols: notes, rests and clefs in three sizes. => font: musical symbols
A book for beginners on the shell. It has exercises with answers at the end of each chapter. => docs: book for beginners on the shell
Command line program to split a PDF file into pages and to join pages again. => tool: split and join PDF files
This library talks to thermometers over a serial line. It knows the protocols of nine makers. => library: talk to thermometers
You build a city on an island and trade with your neighbours. Storms and pirates make it hard. => game: build a city on an island
A heavy typeface without serifs, for headlines and posters. It has capital letters only. => font: heavy typeface for headlines
Notes for administrators who move from the old version of the database to the new one. => docs: move to the new database version
It shows which programs use the network, and how much. It works in a terminal. => tool: show which programs use the network
This package helps Java programs to read archives, among them ZIP and TAR, without unpacking them. => library: read archives in Java
A card game for one person with two decks. There are eight kinds of it and a list of the best results. => game: card game for one person
Rounded letters for children's books. The font has accents for most languages of Europe. => font: rounded letters for children
The handbook of the mail reader: filters, folders, encryption and how to write plug-ins. => docs: handbook of the mail reader
This program makes a copy of your home folder every night and keeps the copies of a month. => tool: copy the home folder every night
A small library for sound. It plays several files at once and changes their speed. => library: play sound files
Run from the dragon, jump over walls and collect keys. Each time the levels are different. => game: run from the dragon
A typeface in the style of old newspapers. It is narrow and comes in two weights. => font: narrow newspaper typeface
Descriptions of all error messages of the compiler, with causes and cures. => docs: error messages of the compiler
This tool turns recorded speech into text. It needs no network. => tool: turn speech into text
This library checks passwords against a list of common ones and says how strong they are. => library: check passwords
A chess game with a clock. It saves games and can take moves back. => game: chess with a clock
This font contains pictures of weather: sun, clouds, rain and snow. => font: pictures of weather
Manual of the web server in two parts, for users and for developers. => docs: manual of the web server
"""  # noqa: E501
VALID_ROWS = 10

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
# `score_texts` measures answers. It takes names of known metrics or your own function.
# This one is the share of answers that start with a kind. Ten rows are few: look at the
# standard errors before you believe a difference.

# %%
KINDS = ("tool: ", "library: ", "game: ", "font: ", "docs: ")


def in_style(predictions, references):
    """Percentage of answers in house style."""
    return 100 * sum(p.startswith(KINDS) for p in predictions) / len(predictions)


def measure(model):
    """Answers to the validation texts, and their scores."""
    answers = model.generate(valid["encoder_text"], num_beams=4)
    scores = keras_t5gemma.score_texts(
        answers, valid["decoder_text"], ["rouge", in_style]
    )
    for name in ("rouge1", "rougeL"):
        score = scores[name]
        print(f"{name:>8}: {score['mean']:.1f} ± {score['standard_error']:.1f}")
    print(f"in style: {scores['in_style']['mean']:.0f} %")
    return answers, scores


model = keras_t5gemma.Seq2SeqLM.from_preset("t5gemma_mini_synopsis")
answers_before, scores_before = measure(model)

# %% [markdown]
# ## Train
#
# - `GenerationMetrics` writes answers to a sample after epochs and measures them.
# - `SaveBest` keeps the best epoch as a preset.
# - `BackupAndRestore` lets the same `fit` resume after a kill, with the same result.
# - `fit` itself stops at a NaN loss, names the rows, and shows tokens a second.
#
# `batching="bucketed"`, the default, puts texts of similar length together.

# %%
model.compile(
    optimizer=keras.optimizers.AdamW(4e-4, beta_2=0.98, global_clipnorm=1.0),
)
callbacks = keras_t5gemma.callbacks
history = model.fit(
    train,
    validation_data=valid,
    batch_size=8,
    epochs=8,
    callbacks=[
        callbacks.GenerationMetrics(valid, metrics=in_style, every=4, num_beams=4),
        callbacks.SaveBest(RUN / "best"),
        keras.callbacks.CSVLogger(str(RUN / "log.csv")),
        callbacks.BackupAndRestore(RUN / "backup"),
    ],
    verbose=2,
)
losses = history.history["val_loss"]
print(f"validation loss: {losses[0]:.2f} after epoch 1, {min(losses):.2f} at best")

# %% [markdown]
# ## Look at it
#
# A training loss that falls while the validation loss rises means: fewer epochs, more
# data, a lower learning rate, or LoRA.

# %%
# %matplotlib inline
keras_t5gemma.plot_history(history, RUN / "curves.png")

# %% [markdown]
# ## After
#
# The best epoch, loaded as anybody would load it.

# %%
best = keras_t5gemma.Seq2SeqLM.from_preset(RUN / "best")
answers_after, scores_after = measure(best)
columns = zip(
    valid["encoder_text"],
    valid["decoder_text"],
    answers_before,
    answers_after,
    strict=True,
)
for row in list(columns)[:5]:
    print()
    for name, text in zip(("text", "wanted", "before", "after"), row, strict=True):
        print(f"{name:>7}: {text}")
print(
    f"\nin house style: {scores_before['in_style']['mean']:.0f} % before, "
    f"{scores_after['in_style']['mean']:.0f} % after"
)

# %% [markdown]
# `RUN / "best"` can be copied, or uploaded with `keras_hub.upload_preset`.
#
# ## Your own data
#
# The same as a command, with everything in a run folder: configuration, log, curves,
# samples, scores, preset, model card. The same command resumes an interrupted run.
#
# ```bash
# keras-t5gemma finetune --preset t5gemma_mini_synopsis --train train.jsonl \
#     --valid valid.jsonl --test test.jsonl --output runs/mine --epochs 3
# ```
#
# ## Larger models
#
# Memory while training is weights + gradients + what the optimizer keeps, and the
# activations. The bytes for each parameter, with `dtype="mixed_bfloat16"` (float32
# weights, bfloat16 arithmetic): 4 + 4 with Adafactor, which keeps next to nothing, and
# 4 + 4 + 8 with AdamW. `dtype="bfloat16"` with Adafactor is 2 + 2.
#
# The activations are small with `compile(rematerialize=True)`: one input a block. For
# a batch of 8 with 512 source and 128 target tokens at width 2,304 that is 26 x 8 x 640
# x 2,304 x 2 bytes = 0.6 GB. Add 1 GB for the block that is being worked on, and 1.2 GB
# for the table of tokens in bfloat16 (256,000 x 2,304 x 2 bytes). The logits are never
# whole. These are sums, not measurements: leave 10 % free.
#
# **2B-2B on one GPU** (`t5gemma_2b_2b_prefixlm_it`, 5.6 billion parameters):
#
# | | all weights, AdamW | all weights, Adafactor | LoRA, rank 16 |
# |---|---|---|---|
# | dtype | mixed_bfloat16 | mixed_bfloat16 | mixed_bfloat16 |
# | arithmetic | 5.6 x 16 | 5.6 x 8 | 5.6 x 4 + 0.04 x 16 |
# | weights and state | 90 GB | 45 GB | 23 GB |
# | with activations | 93 GB | 48 GB | 26 GB |
#
# ```python
# model = keras_t5gemma.Seq2SeqLM.from_preset(
#     "t5gemma_2b_2b_prefixlm_it", dtype="mixed_bfloat16"
# )
# model.enable_lora(16, parts=["encoder", "decoder", "cross_attention", "mlp"])
# model.compile(
#     optimizer=keras.optimizers.AdamW(
#         2e-4, global_clipnorm=1.0, gradient_accumulation_steps=4
#     ),
#     rematerialize=True,
# )
# model.fit(train, batch_size=8, epochs=2)  # 32 pairs an update.
# ```
#
# On a card of 24 GB take `dtype="bfloat16"`: 5.6 x 2 = 11 GB, about 14 GB in all. Adam
# in bfloat16 needs `beta_2=0.98`; the package refuses the default, which cannot learn.
#
# **9B-2B** (`t5gemma_9b_2b_prefixlm_it`, 12.3 billion parameters): all weights with
# Adafactor are 12.3 x 8 = 98 GB, too much for one card of 80 GB; in bfloat16 12.3 x 4 =
# 49 GB fit. LoRA of rank 16 in bfloat16 is 12.3 x 2 = 25 GB, on an int8 base
# (`model.quantize("int8")` before `enable_lora`) 12.3 GB, each plus 2 to 4 GB. Batch 4,
# accumulation 8. Or train the decoder alone: `model.backbone.encoder.trainable = False`
# before `compile`.

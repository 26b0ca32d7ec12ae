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
# # Fine-tune for translation with LoRA
#
# What this shows: training small matrices next to frozen weights (LoRA, arXiv
# 2106.09685), part by part. The result is a small file of adapters. It can be loaded
# onto the base, or merged into it.
#
# The preset inside the package has seen English only, and its vocabulary is English:
# an Italian word is several of its pieces. The few dozen pairs below are too few to
# teach Italian, but they show the machinery: the loss falls, the base stays as it is,
# adapters are added, saved, loaded and merged. "On real data" below has the result of
# 42,000 pairs.
#
# Time on two processor cores: about 2 minutes.

# %% tags=["skip-execution"]
# On a hosted notebook service such as Colab or Kaggle:
# %pip install -q "keras-t5gemma[jax,finetune]"
# %env KERAS_BACKEND=jax

# %%
import math
import os
from pathlib import Path

import keras
import numpy as np

import keras_t5gemma

keras.utils.set_random_seed(0)
RUN = Path("runs/translation")
RUN.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## The data
#
# Short English lines and their Italian, written for this guide. With
# `GUIDE_DATA=pairs.jsonl` in the environment the guide takes your file in its place:
# one object a line, with the fields `source` and `target`.

# %%
PAIRS = """
library to read JSON files => libreria per leggere file JSON
library to write CSV files => libreria per scrivere file CSV
library to read and write images => libreria per leggere e scrivere immagini
library for charts => libreria per grafici
library for matrices => libreria per matrici
library for dates => libreria per date
library to play sound files => libreria per riprodurre file audio
library to check passwords => libreria per controllare password
tool to rename files => strumento per rinominare file
tool to copy files => strumento per copiare file
tool to convert images => strumento per convertire immagini
tool to split PDF files => strumento per dividere file PDF
tool to measure the speed of a disk => strumento per misurare la velocità di un disco
tool to show free disk space => strumento per mostrare lo spazio libero su disco
tool to find files => strumento per trovare file
tool to read mail => strumento per leggere la posta
game of chess => gioco degli scacchi
card game for one person => gioco di carte per una persona
card game for two players => gioco di carte per due giocatori
board game for two players => gioco da tavolo per due giocatori
puzzle game with blocks => gioco di logica con blocchi
adventure game => gioco di avventura
strategy game => gioco di strategia
documentation of the mail server => documentazione del server di posta
documentation of the web server => documentazione del server web
documentation of the library => documentazione della libreria
documentation of the game => documentazione del gioco
development files => file di sviluppo
development files of the library => file di sviluppo della libreria
data files => file di dati
data files of the game => file di dati del gioco
debugging symbols => simboli di debug
font with serifs => carattere con grazie
font for headlines => carattere per titoli
font for programmers => carattere per programmatori
web server => server web
mail server => server di posta
text editor => editor di testo
image viewer => visualizzatore di immagini
file manager => gestore di file
window manager => gestore di finestre
music player => lettore musicale
calendar for the desktop => calendario per il desktop
clock for the desktop => orologio per il desktop
shared library => libreria condivisa
shared library for sound => libreria condivisa per audio
Python library for dates => libreria Python per date
Python library to read images => libreria Python per leggere immagini
library to write JSON files => libreria per scrivere file JSON
tool to find images => strumento per trovare immagini
development files of the game => file di sviluppo del gioco
documentation of the text editor => documentazione dell'editor di testo
data files of the library => file di dati della libreria
library for sound => libreria per audio
font for titles => carattere per titoli
Python library for charts => libreria Python per grafici
"""
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
# Italian needs more pieces than English in this vocabulary. The decoder's length has to
# hold them: what it cuts, `fit` counts in a warning.

# %%
model = keras_t5gemma.Seq2SeqLM.from_preset("t5gemma_mini_synopsis")
tokenize = model.preprocessor.tokenizer.tokenize
for name, column in pairs.items():
    lengths = [len(ids) for ids in tokenize(column)]
    print(f"{name}: {np.mean(lengths):.1f} pieces a row, at most {max(lengths)}")

# %% [markdown]
# ## Choose what learns
#
# `parts` says where adapters go: `"encoder"` and `"decoder"` (their self-attention),
# `"cross_attention"`, `"mlp"` and `"embeddings"`. All weights are frozen, the
# embeddings too unless they are named. That is right for a large model which knows the
# language. This one does not know Italian, so its embeddings get adapters as well.

# %%
before = [np.array(keras.ops.convert_to_numpy(v)) for v in model.weights]
model.enable_lora(
    32, parts=["encoder", "decoder", "cross_attention", "mlp", "embeddings"]
)
learns = sum(math.prod(v.shape) for v in model.trainable_variables)
print(f"{learns:,} weights learn, next to {sum(map(np.size, before)):,} that do not")

# %% [markdown]
# ## Train
#
# Adapters start as nothing: one of their two matrices is zero. They take a learning
# rate about ten times that of full fine-tuning, with a warm-up and a cosine to zero.

# %%
EPOCHS, BATCH = 10, 8
steps = EPOCHS * math.ceil(len(train["encoder_text"]) / BATCH)
rate = keras.optimizers.schedules.CosineDecay(
    0.0, steps, warmup_target=3e-3, warmup_steps=steps // 10
)
model.compile(
    optimizer=keras.optimizers.AdamW(
        rate, weight_decay=0.01, beta_2=0.98, global_clipnorm=1.0
    )
)
history = model.fit(
    train,
    validation_data=valid,
    batch_size=BATCH,
    epochs=EPOCHS,
    callbacks=[
        keras_t5gemma.callbacks.GenerationMetrics(valid, metrics="chrf", every=5),
        keras_t5gemma.callbacks.BackupAndRestore(RUN / "backup"),
    ],
    verbose=2,
)
losses = history.history["loss"]
print(f"training loss: {losses[0]:.2f} in epoch 1, {losses[-1]:.2f} in the last")

# %%
# %matplotlib inline
keras_t5gemma.plot_history(history, RUN / "curves.png")

# %% [markdown]
# ## Compare with copying
#
# In texts like these many words stay as they are (JSON, PDF, names). Copying the source
# scores well above 0 then. It is the number to beat, on the same rows.

# %%
answers = model.generate(valid["encoder_text"])
for name, texts in (("copying", valid["encoder_text"]), ("model", answers)):
    scores = keras_t5gemma.score_texts(texts, valid["decoder_text"], ["bleu", "chrf"])
    cells = [
        f"{metric} {score['mean']:.1f} ± {score['standard_error']:.1f}"
        for metric, score in scores.items()
    ]
    print(f"{name:>8}: {', '.join(cells)}")
for row in zip(*valid.values(), answers, strict=True):
    print(" => ".join(row))

# %% [markdown]
# ## Keep it
#
# The adapters alone are a small file, for many tasks on one base. `save_to_preset`
# merges them into the weights: one folder that needs no LoRA to load. Both give the
# same answers.

# %%
model.save_lora_weights(RUN / "italian.lora.h5")
model.save_to_preset(RUN / "merged")
print(f"adapters: {(RUN / 'italian.lora.h5').stat().st_size / 1e6:.1f} MB")

base = keras_t5gemma.Seq2SeqLM.from_preset("t5gemma_mini_synopsis")
same = all(
    np.array_equal(old, keras.ops.convert_to_numpy(new))
    for old, new in zip(before, base.weights, strict=True)
)
print("the preset is unchanged:", same)
base.load_lora_weights(RUN / "italian.lora.h5")
merged = keras_t5gemma.Seq2SeqLM.from_preset(RUN / "merged")
for name, other in (("base with adapters", base), ("merged preset", merged)):
    print(f"{name} answers alike:", other.generate(valid["encoder_text"]) == answers)

# %% [markdown]
# ## On real data
#
# Adapters of rank 32 on all seven projections of every block and on the embeddings,
# trained on synopses of Debian packages: 900 steps of 32 out of 42,405 pairs, learning
# rate 2e-3, 23 minutes of one processor core with the evaluation. BLEU and chrF with
# bootstrap standard errors on 1,000 test rows, without `generation_defaults`:
#
# | | BLEU | chrF |
# |---|---|---|
# | copying the source | 8.2 ± 0.5 | 38.7 ± 0.4 |
# | LoRA, greedy | 15.2 ± 0.9 | 40.0 ± 0.6 |
# | LoRA, 4 beams | 20.7 ± 0.7 | 42.6 ± 0.6 |
#
# Well above copying, and far from good: it knows the frequent phrases (`file di
# sviluppo`, `documentazione`) and invents words for the rest. The script is
# `tools/translation_lora.py`.
#
# ## Your own data
#
# ```bash
# keras-t5gemma finetune --preset t5gemma_mini_synopsis --train train.jsonl \
#     --valid valid.jsonl --test test.jsonl --output runs/mine --metrics bleu chrf \
#     --lora-rank 32 --lora-parts encoder decoder cross_attention mlp embeddings \
#     --optimizer adamw --learning-rate 2e-3 --schedule cosine --warmup-steps 100 \
#     --decoder-sequence-length 64
# ```
#
# ## Larger models
#
# The published models know Italian. Leave the embeddings frozen, take a lower rank and
# a lower learning rate. LoRA keeps gradients and optimizer state for the adapters only,
# so memory is the frozen weights, 16 bytes for each adapter weight (float32 weight,
# gradient, two moments), and the activations.
#
# **2B-2B on one GPU** (`t5gemma_2b_2b_prefixlm_it`, 5.6 billion parameters). Rank 16 on
# query and value of all attention, and on all three matrices of the feed-forward
# layers: 78 x 16 x (4,352 + 3,328) + 52 x 3 x 16 x 11,520 = 38 million weights, 0.6 GB.
# Activations of 8 pairs of 128 + 128 tokens with `rematerialize=True`: 26 x 8 x 256 x
# 2,304 x 2 bytes = 0.2 GB, and 2 GB for the block at work and the table of tokens.
#
# | base | arithmetic | GB in all |
# |---|---|---|
# | `dtype="mixed_bfloat16"` | 5.6 x 4 + 0.6 + 2.2 | 25 |
# | `dtype="bfloat16"` | 5.6 x 2 + 0.3 + 2.2 | 14 |
# | int8, bfloat16 around it | 5.6 x 1 + 0.3 + 2.2 | 8 |
#
# ```python
# model = keras_t5gemma.Seq2SeqLM.from_preset(
#     "t5gemma_2b_2b_prefixlm_it", dtype="mixed_bfloat16"
# )
# model.enable_lora(16, parts=["encoder", "decoder", "cross_attention", "mlp"])
# model.compile(
#     optimizer=keras.optimizers.AdamW(
#         2e-4, beta_2=0.98, global_clipnorm=1.0, gradient_accumulation_steps=4
#     ),
#     rematerialize=True,
# )
# model.fit(train, batch_size=8, epochs=2)  # 32 pairs an update.
# ```
#
# For the int8 row call `model.quantize("int8")` before `enable_lora`. These are sums,
# not measurements: leave 10 % free.
#
# **9B-2B** (`t5gemma_9b_2b_prefixlm_it`, 12.3 billion parameters). The same parts at
# rank 16 are 66 million weights, 1.1 GB with their state. The base is 12.3 x 4 = 49 GB
# in mixed_bfloat16, 25 GB in bfloat16, 12.3 GB in int8, each plus 3 to 4 GB. Take
# `batch_size=4` and `gradient_accumulation_steps=8`. `parts=["decoder",
# "cross_attention"]` leaves the large encoder as it is: no gradients go through it,
# which is most of the time and the memory of a step.

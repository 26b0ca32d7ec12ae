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
# # Continue pretraining with UL2 and PrefixLM
#
# What this shows: plain text in, a better encoder-decoder out. What the objectives make
# of a text; training on them with `fit`; learning from a teacher, in memory or from
# disk; and the command that does all of it from files, with a run folder.
#
# It starts from the preset inside this package, which knows one task, and lets it read
# the documentation of Python's standard library for a minute. The last sections say
# what changes for an adapted Gemma 2.
#
# Time on two processor cores: about 2 minutes.

# %% tags=["skip-execution"]
# On a hosted notebook service such as Colab or Kaggle:
# %pip install -q "keras-t5gemma[jax,finetune]"
# %pip install -q --no-deps "keras-hub>=0.32" regex
# %env KERAS_BACKEND=jax

# %%
import inspect
from importlib import import_module
from pathlib import Path

import keras
import keras_hub

import keras_t5gemma
from keras_t5gemma import objectives

keras.utils.set_random_seed(0)
RUN = Path("runs/pretraining")
RUN.mkdir(parents=True, exist_ok=True)

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
# ## What an objective makes of a text
#
# `PrefixLM` cuts a text into halves: one is read, the other is written. `UL2` takes
# spans out and leaves sentinels in their place, pieces of the vocabulary that were
# never used; the decoder writes sentinels and spans. Which spans, comes from a seed.

# %%
preset = "t5gemma_mini"
tokenizer = keras_t5gemma.Tokenizer.from_preset(preset)
prefix_lm = objectives.PrefixLM()
ul2 = objectives.UL2.from_tokenizer(tokenizer)
text = "The quick brown fox jumps over the lazy dog and runs away into the wood."
for name, objective in (("PrefixLM", prefix_lm), ("UL2", ul2)):
    for seed in (0, 1):
        ids = tokenizer.tokenize([text])
        source, target = (side[0] for side in objective(ids, seeds=[seed]))
        shown = [
            tokenizer.detokenize(side.tolist(), skip_control_tokens=False)
            for side in (source, target)
        ]
        print(f"{name}, seed {seed}:\n   reads {shown[0]}\n  writes {shown[1]}")

# %% [markdown]
# ## Train
#
# An objective in the preprocessor is all it takes: `fit` then takes plain text, cuts
# what is too long into pieces, and packs the pairs into full rows, where they do not
# see each other. A preset that is saved has no objective: it is used, and fine-tuned,
# as any other.

# %%


def load(objective):
    """The preset, with rows of 96 tokens to read and 96 to write."""
    preprocessor = keras_t5gemma.Seq2SeqLMPreprocessor.from_preset(
        preset,
        encoder_sequence_length=96,
        decoder_sequence_length=96,
        objective=objective,
    )
    return keras_t5gemma.Seq2SeqLM.from_preset(preset, preprocessor=preprocessor)


def train_on(model, loss="auto", steps=24):
    """Train; say what the loss on the held-out documents was and is."""
    keras.utils.set_random_seed(0)
    optimizer = keras.optimizers.Adam(1e-3, global_clipnorm=1.0)
    model.compile(optimizer=optimizer, loss=loss)
    before = model.evaluate(held_out, batch_size=8, return_dict=True, verbose=0)
    model.fit(train, batch_size=8, steps_per_epoch=steps, verbose=2)
    after = model.evaluate(held_out, batch_size=8, return_dict=True, verbose=0)
    return f"{before['loss']:.2f} before, {after['loss']:.2f} after"


print("UL2: loss", train_on(load(ul2)))
model = load(prefix_lm)
print("PrefixLM: loss", train_on(model))

# %% [markdown]
# ## Learn from a teacher
#
# T5Gemma's PrefixLM checkpoints did not learn what the next token *is* but what Gemma 2
# thinks it *could be*. `Distillation` takes any KerasHub causal LM of the same
# vocabulary. Its scores, for 256,000 tokens each, are never in memory together.
#
# The teacher here is a random model, to show the calls: nothing can be learned from it.

# %%
backbone = keras_hub.models.GemmaBackbone(
    vocabulary_size=tokenizer.vocabulary_size(),
    num_layers=1,
    num_query_heads=2,
    num_key_value_heads=1,
    hidden_dim=32,
    intermediate_dim=64,
    head_dim=16,
)
teacher = keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=None)
model = load(prefix_lm)
loss = keras_t5gemma.Distillation(teacher, label_weight=0.5)
print("with a teacher: loss", train_on(model, loss, steps=3))

# %% [markdown]
# Where there is no room for both, the teacher reads the texts once and its 64 most
# likely tokens go to disk. They are bound to the texts and to the lengths, and say so
# when they do not fit.

# %%
scores = keras_t5gemma.write_teacher_scores(
    RUN / "teacher", teacher, model.preprocessor, train[:40], top_k=64, verbose=0
)
model.compile(loss=keras_t5gemma.Distillation(scores))
history = model.fit(train[:40], batch_size=8, verbose=0)
print(f"from disk: training loss {history.history['loss'][0]:.2f}")

# %% [markdown]
# ## The same from files, in one command
#
# `keras-t5gemma pretrain` adds what a long run needs: cosine schedule with warm-up,
# clipping, backups from which a run resumes bit-exactly, the mean of the
# last models, curves, scores before and after, a model card. A document a line.

# %%
for name, part in (("train", train), ("valid", held_out)):
    lines = [" ".join(text.split()) for text in part]
    (RUN / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
scores = keras_t5gemma.pretrain(
    preset,
    RUN / "train.txt",
    RUN / "run",
    RUN / "valid.txt",
    objective="t5gemma2",
    encoder_sequence_length=96,
    decoder_sequence_length=96,
    max_steps=12,
    steps_per_epoch=6,
    average_last=2,
    overwrite=True,
)
loss = scores["valid"]["loss"]
print(f"held-out loss {loss['before']:.2f} -> {loss['mean']:.2f}")

# %% [markdown]
# In a shell:
#
# ```bash
# keras-t5gemma pretrain --preset t5gemma_mini --train train.txt \
#     --valid valid.txt --output runs/pretraining/run --objective t5gemma2
# ```
#
# ## Which objective?
#
# The paper finds UL2 better for what the encoder knows, PrefixLM with a teacher better
# for what the decoder writes. `experiments/` of the repository has our own comparison
# at small sizes.
#
# ## Real Gemma 2
#
# Start from what `keras-t5gemma adapt` wrote (guide *adapt_gemma2*), take your text,
# and the source as teacher:
#
# ```bash
# keras-t5gemma pretrain --preset t5gemma_2b_2b --train corpus.jsonl --output RUN \
#     --objective prefixlm --teacher gemma2_2b_en --teacher-scores scores \
#     --dtype bfloat16 --rematerialize --encoder-sequence-length 2048 \
#     --decoder-sequence-length 2048 --batch-size 2 --max-steps 10000
# ```
#
# **2B-2B on one GPU.** 5.6 billion parameters: 11 GB of weights in bfloat16, as much
# of gradients; Adafactor needs little. A live teacher of 2B adds 5 GB; from disk it
# adds none, but 384 bytes a token of text: 400 GB for a billion tokens, 40 GB with
# `--top-k 6`.
#
# **9B-2B.** 12.3 billion parameters: 25 GB of weights in bfloat16, 49 GB with
# gradients. A live teacher of 9B is 18 GB more. Its cross-attention is random: the
# command trains that alone for the first 1,000 steps (`--cross-attention-steps`).

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
# # Train 9B-2B on a pod
#
# What this shows: a model that no device could hold alone, trained on many of them, by
# several processes on several machines. How to know beforehand what fits; one line that
# splits everything; text from more files than memory holds; a backup that another
# number of devices goes on from.
#
# The pod here is simulated, eight devices of one processor, and the model is the small
# one of this package; everything else is what a real pod runs. It needs JAX, the engine
# that splits Keras models, and Grain.
#
# Time on two processor cores: about 2 minutes.

# %% tags=["skip-execution"]
# On a hosted notebook service such as Colab or Kaggle:
# %pip install -q "keras-t5gemma[jax,distributed]"

# %%
import inspect
import json
import os
from importlib import import_module
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"
# A pod has its devices already: leave this out there.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import keras

import keras_t5gemma

RUN = Path("runs/pod")
RUN.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## Several processes
#
# A pod is many machines with a process each, all started with this same script. They
# meet at the address of the first one. Who is missing, or was started with something
# else, is named in an error in all of them, after `timeout` seconds. One process, as
# here, has nobody to meet. It comes before anything is computed.

# %%
PROCESSES = int(os.environ.get("POD_PROCESSES", "1"))
INDEX = int(os.environ.get("POD_INDEX", "0"))
ADDRESS = os.environ.get("POD_ADDRESS", "127.0.0.1:9876")

MODULES = "argparse csv functools json pathlib"


def documents():
    """What Python says of itself: docstrings of some modules, each once."""
    texts = {}
    for name in MODULES.split():
        module = import_module(name)
        parts = [module, *vars(module).values()]
        parts += [v for p in parts if inspect.isclass(p) for v in vars(p).values()]
        for part in parts:
            doc = getattr(part, "__doc__", None)
            if isinstance(doc, str) and len(doc) > 200:
                texts[inspect.cleandoc(doc)] = None
    return list(texts)


if INDEX == 0:  # All processes read the same files; one writes them, before they meet.
    (RUN / "texts").mkdir(exist_ok=True)
    lines = [json.dumps({"text": text}) + "\n" for text in documents()]
    for i in range(4):
        (RUN / f"texts/{i}.jsonl").write_text("".join(lines[i::4]), encoding="utf-8")

if PROCESSES > 1:
    keras_t5gemma.connect(ADDRESS, PROCESSES, INDEX, timeout=300)
keras.utils.set_random_seed(0)

# %% [markdown]
# ## What fits?
#
# `plan` adds up what a training takes on each device, weights, gradients, optimizer,
# activations and what is gathered meanwhile, and looks for the layout that fits and
# has least to send. Nothing of the model is made. Weights and optimizer are exact, the
# rest is what a compiler should need and may exceed: leave room. All weights of 9B-2B
# with AdamW, 256 pairs of 4,096 and 1,024 tokens a step, on 64 devices:

# %%
found = keras_t5gemma.plan(
    "t5gemma_9b_2b", devices=64, memory="80GB", batch=256, length=(4096, 1024)
)
print(found.strategy, found.mesh, f"{found.total / 1e9:.0f} GB on each device")

# %% [markdown]
# The same as a command, with every part in a table:
#
# ```bash
# keras-t5gemma plan --preset t5gemma_9b_2b --devices 64 --memory 80GB \
#     --batch 256 --length 4096 1024
# ```
#
# ## One switch
#
# From here on models are made in pieces: `"fsdp"` splits every large variable over the
# mesh axis `"data"`, and `model=2` splits heads, feed-forward and vocabulary over two
# devices besides. Weights are read piece by piece, each by the process that holds it.
# What is small stays whole; of this small model that is a part that shows.

# %%
mesh = keras_t5gemma.distribute("fsdp", model=2)
model = keras_t5gemma.Seq2SeqLM.from_preset("t5gemma_mini")
model.preprocessor.encoder_sequence_length = 64
model.preprocessor.decoder_sequence_length = 64
model.preprocessor.objective = keras_t5gemma.objectives.PrefixLM()
model.compile(keras.optimizers.AdamW(1e-3, global_clipnorm=1.0), rematerialize=True)


def largest_share(variables):
    """Of the bytes of variables, what the device holds that holds most, in percent."""
    held, whole = {}, 0
    for variable in variables:
        whole += variable.value.nbytes
        for piece in variable.value.addressable_shards:
            held[piece.device] = held.get(piece.device, 0) + piece.data.nbytes
    return 100 * max(held.values()) / whole


print(mesh)
model.optimizer.build(model.trainable_variables)
print(
    f"a device holds {largest_share(model.variables):.0f} % of the weights and "
    f"{largest_share(model.optimizer.variables):.0f} % of the optimizer's state"
)

# %% [markdown]
# ## Text, and training
#
# `TextFiles` are files of plain text, of which an objective makes pairs; `PairFiles`
# are files of pairs. Each process reads its share of the files once, to learn how long
# the rows are, and from then on only the rows that its devices take. Which row is in
# which batch depends on the files and the seed, not on how many processes there are.
#
# The backup is written by all of them together, whole or not at all. Killed and started
# again, on as many devices or another number, the training goes on after the last one.

# %%
data = keras_t5gemma.TextFiles(model.preprocessor, [RUN / "texts"], batch_size=16)
backup = keras_t5gemma.callbacks.BackupAndRestore(RUN / "backup", save_freq=5)
history = model.fit(data, epochs=2, callbacks=[backup], verbose=2 if INDEX == 0 else 0)
first, last = history.history["loss"]
print(f"loss: {first:.4f} in the first epoch, {last:.4f} in the second")

# %% [markdown]
# ## Use it
#
# The preset is written whole, tensor by tensor, and is one as any other: it loads on
# another mesh, or on none. `generate` and `score` give on a mesh what they give on one
# device; of several processes all ask the same, and all get the answer.

# %%
model.preprocessor.objective = None
model.save_to_preset(RUN / "preset")
text = documents()[0][:200]
answer = model.generate(text, max_length=24)
print("written on the mesh:", " ".join(answer.split()))
if PROCESSES == 1:
    mesh.undo()
    alone = keras_t5gemma.Seq2SeqLM.from_preset(RUN / "preset")
    print("one device agrees:", alone.generate(text, max_length=24) == answer)

# %% [markdown]
# ## A real pod
#
# Every process runs the script, with its own index and the same address:
#
# ```bash
# POD_PROCESSES=16 POD_INDEX=$INDEX POD_ADDRESS=$FIRST:9876 python train.py
# ```
#
# Take out the line with `XLA_FLAGS`, and write in place of what is small here:
#
# ```python
# mesh = keras_t5gemma.distribute("fsdp")
# model = keras_t5gemma.Seq2SeqLM.from_preset(
#     "adapted_9b_2b", dtype="mixed_bfloat16"  # A folder that all processes see.
# )
# model.compile(optimizer, rematerialize=True)
# data = keras_t5gemma.TextFiles(model.preprocessor, folder, batch_size=256)
# warm_up = keras_t5gemma.callbacks.CrossAttentionWarmUp(1000)
# ```
#
# Whatever `plan` says goes there too: `distribute(found.strategy, **found.mesh)`.
#
# **9B-2B** (12.3 billion parameters): weights, gradients and AdamW's state are 12.3 x
# 16 = 197 GB, 3.1 GB on each of 64 devices, 12.3 GB on each of 16. Activations come on
# top, with `rematerialize=True` one input a block; `plan` has them.
#
# **2B-2B on one GPU** needs none of this (5.6 billion parameters, see the fine-tuning
# guides). On eight GPUs of one machine `distribute("fsdp")` is the only line to add:
# 5.6 x 16 / 8 = 11 GB each.
#
# When one process dies, JAX ends the others after `connect(heartbeat=100)` seconds:
# start all of them again. On PyTorch and TensorFlow Keras splits nothing;
# `tools/train_ddp.py` and `tools/train_mirrored.py` copy the model to each device.

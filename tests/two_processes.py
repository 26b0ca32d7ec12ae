"""What `test_two_processes` starts twice: one training on the devices of both.

`python two_processes.py PORT INDEX FOLDER RESULT [name=value ...]`
"""

import os
import signal
import sys

import conftest
import keras
import numpy as np

import keras_t5gemma as kt
from keras_t5gemma.distribution import processes

SOURCES = [f"{s} {i}" for i in range(4) for s in conftest.SENTENCES]
TARGETS = [s.split()[-1] for _ in range(4) for s in conftest.SENTENCES]


class Kill(keras.callbacks.Callback):
    """No clean end: as a power cut."""

    def __init__(self, step):
        super().__init__()
        self.step, self.seen = step, 0

    def on_train_batch_end(self, batch, logs=None):
        self.seen += 1
        if self.seen == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def make_model(options):
    preprocessor = kt.Seq2SeqLMPreprocessor(kt.Tokenizer(conftest.make_proto()), 32, 8)
    config = conftest.one_block_config(dropout=0.1)
    if "preset" in options:
        model = kt.Seq2SeqLM.from_preset(options["preset"], preprocessor=preprocessor)
    else:
        model = kt.Seq2SeqLM(kt.Backbone(config), preprocessor)
    rate = float(options.get("rate", 1e-2))
    model.compile(optimizer=keras.optimizers.AdamW(rate))
    return model


def train(model, options, callbacks=()):
    return model.fit(
        SOURCES,
        TARGETS,
        batch_size=8,
        epochs=2,
        verbose=0,
        callbacks=list(callbacks),
    ).history


def values(model):
    """Name and whole value of everything that training changes."""
    from keras_t5gemma.checkpoints.tensors import gathered

    found = {}
    for v in [*model.variables, *model.optimizer.variables]:
        found[v.path.partition("/")[2] + str(len(found))] = np.asarray(
            gathered(v.value)
        )
    return found


def main(port, index, folder, result, *options):
    options = dict(option.split("=") for option in options)
    processes.connect(
        f"127.0.0.1:{port}",
        2,
        int(index),
        timeout=float(options.get("timeout", 60)),
        heartbeat=10,
        same={"width": options.get("width", 16)},
    )
    keras.utils.set_random_seed(7)
    kt.distribute("fsdp")
    model = make_model(options)
    callbacks = [kt.callbacks.BackupAndRestore(folder, save_freq=1)]
    if "kill" in options:
        callbacks.append(Kill(int(options["kill"])))
    history = train(model, options, callbacks)
    found = values(model)
    model.save_to_preset(result + ".preset")
    if index == "0":
        np.savez(result, **found, loss=history["loss"], padding=history["padding"])


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What `test_two_processes` starts: a training on the devices of two processes, or one.

`python -m helpers.two_processes PORT INDEX FOLDER [name=value ...]`
"""

import json
import os
import signal
import sys
from pathlib import Path

import keras
import numpy as np

import keras_t5gemma as kt
from keras_t5gemma.distribution import layouts, process_group
from keras_t5gemma.distribution.shared_arrays import gathered


class Kill(keras.callbacks.Callback):
    """No clean end: as a power cut."""

    def __init__(self, step):
        super().__init__()
        self.step, self.seen = step, 0

    def on_train_batch_end(self, batch, logs=None):
        self.seen += 1
        if self.seen == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def attempt_in_vain(port, index):
    """Say what `connect` says about configurations that differ, and a missing peer."""
    attempts = [(port, 60, {"model": {"width": 16 + index}}), (port + 1 + index, 2, {})]
    for place, timeout, same in attempts:
        try:
            kt.connect(f"127.0.0.1:{place}", 2, index, timeout, same=same)
        except (ValueError, TimeoutError) as error:
            print(f"{type(error).__name__}: {error}", flush=True)


def train(folder, callbacks=()):
    keras.utils.set_random_seed(7)
    model = kt.Seq2SeqLM.from_preset(folder / "preset")
    model.compile(optimizer=keras.optimizers.AdamW(1e-2))
    data = kt.PairFiles(model.preprocessor, folder / "data", batch_size=8)
    callbacks = [kt.callbacks.BackupAndRestore(folder / "backup", 1), *callbacks]
    history = model.fit(data, epochs=2, verbose=0, callbacks=callbacks).history
    return model, history


def save(path, model, history):
    """Every value that training changes, whole, and what was reported."""
    variables = [*model.variables, *model.optimizer.variables]
    values = {
        f"{number} {v.path}": np.asarray(gathered(v.value))
        for number, v in enumerate(variables)
    }
    np.savez(path, **values, loss=history["loss"], padding=history["padding"])


def use(folder):
    """What all tasks give and learn, on text that all processes have."""
    from helpers import eight_devices as tasks  # Not all that is started needs it.

    keras.utils.set_random_seed(0)
    int8 = kt.Seq2SeqLM.from_preset(folder / "int8")
    tokenizer, errors = int8.preprocessor.tokenizer, []
    if process_group.process_count() > 1:
        for act in (
            lambda: int8.quantize("int8"),
            lambda: int8.save_to_preset(folder / "again"),
        ):
            try:
                act()
            except ValueError as error:
                errors.append(str(error))
    scores = int8.score(tasks.SENTENCES[:3], tasks.SENTENCES[:3])["log_prob"]
    int8.enable_lora(2)
    int8.compile(optimizer=keras.optimizers.SGD(0.1))
    int8.fit(tasks.SENTENCES, tasks.SENTENCES, batch_size=4, verbose=0)
    int8.save_lora_weights(folder / "adapters.lora.h5")
    other = kt.Seq2SeqLM.from_preset(folder / "int8")
    other.load_lora_weights(folder / "adapters.lora.h5")
    learned = (other, int8)
    scores += [model.score("a game", "of chess")["log_prob"] for model in learned]
    texts, *numbers = tasks.use(tasks.text_model(tokenizer))
    numbers += [scores, *tasks.use_encoder(tokenizer)]
    numbers += [tasks.learn_from_teachers(tokenizer)]
    numbers = [np.asarray(n).tolist() for n in numbers]
    return {"texts": texts, "numbers": numbers, "errors": errors}


def main(port, index, folder, *options):
    layouts.LARGE = 16  # So that the weights of a tiny model are split too.
    port, index, folder = int(port), int(index), Path(folder)
    options = dict(option.split("=") for option in options)
    if "errors" in options:
        attempt_in_vain(port, index)
    if options["processes"] == "2":
        kt.connect(f"127.0.0.1:{port}", 2, index, timeout=60, heartbeat=10)
    kt.distribute("fsdp")
    if "use" in options:
        found = json.dumps(use(folder))
        (folder / f"{options['result']}-{index}.json").write_text(found)
        return
    model, history = train(folder)
    trained = [v.value for v in model.trainable_variables]
    split = sum(v.sharding.shard_shape(v.shape) != v.shape for v in trained)
    print("split", split, "of", len(trained), flush=True)
    model.save_to_preset(folder / "trained")
    save(folder / f"{options['result']}-{index}.npz", model, history)
    if "kill" in options:
        train(folder, [Kill(int(options["kill"]))])


if __name__ == "__main__":
    main(*sys.argv[1:])

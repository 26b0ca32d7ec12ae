"""Data-parallel training on TensorFlow with MirroredStrategy.

    python tools/train_mirrored.py --pairs pairs.jsonl --output FOLDER

Each device trains on its share of the rows of each batch. The loss is the mean over the
target tokens of the whole batch, as in `fit` on one device.
"""

import argparse
import os

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import tensorflow as tf

import keras_t5gemma
from keras_t5gemma.data.pair_dataset import PairDataset
from keras_t5gemma.data.text_columns import as_columns


def train(strategy, model, optimizer, batches, epochs):
    """Train the replicas of a model.

    Args:
        strategy: the `tf.distribute.MirroredStrategy` that model and optimizer were
            made under.
        model: a `Seq2SeqLM`.
        optimizer: a Keras optimizer.
        batches: a `PairDataset` of global batches.
        epochs: passes over the data.
    """
    count, variables = strategy.num_replicas_in_sync, model.trainable_variables

    def replica_step(x, labels, weights, total):
        with tf.GradientTape() as tape:
            losses = model({**x, "labels": labels}, training=True)["losses"]
            loss = tf.reduce_sum(losses * weights) / total
        gradients = tape.gradient(loss, [v.value for v in variables])
        optimizer.apply(gradients, variables)  # Sums them over the devices.

    @tf.function(reduce_retracing=True)
    def step(x, labels, weights, total):
        strategy.run(replica_step, args=(x, labels, weights, total))

    def shared(array):
        def share(context):
            return tf.constant(array[context.replica_id_in_sync_group :: count])

        return strategy.experimental_distribute_values_from_function(share)

    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for number in range(batches.num_batches):
            batch = batches[number]
            total = tf.constant(batch[2].sum())
            step(*keras.tree.map_structure(shared, batch), total)


def check_copies(model):
    """Raise `RuntimeError` if weights differ between devices."""
    for variable in model.weights:
        first, *others = (copy.numpy() for copy in variable.value.values)
        if any((other != first).any() for other in others):
            raise RuntimeError(f"{variable.path} is not the same on all devices.")


def main():
    """The command: train and write the preset."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="t5gemma_mini")
    parser.add_argument("--pairs", required=True, help="see `read_pairs`")
    parser.add_argument("--output", required=True, help="folder of the new preset")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="rows of all devices"
    )
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument(
        "--cpus", type=int, help="number of devices to split the CPU into"
    )
    args = parser.parse_args()
    devices = None
    if args.cpus:
        parts = [tf.config.LogicalDeviceConfiguration() for _ in range(args.cpus)]
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, parts)
        devices = [f"cpu:{i}" for i in range(args.cpus)]
    strategy = tf.distribute.MirroredStrategy(devices)
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras_t5gemma.Seq2SeqLM.from_preset(args.preset)
        optimizer = keras.optimizers.AdamW(args.learning_rate)
        optimizer.build(model.trainable_variables)
    columns = as_columns(keras_t5gemma.read_pairs(args.pairs), None)
    batches = PairDataset(
        model.preprocessor, columns, batch_size=args.batch_size, shuffle=True
    )
    train(strategy, model, optimizer, batches, args.epochs)
    check_copies(model)
    model.save_to_preset(args.output)


if __name__ == "__main__":
    main()

"""Data-parallel training on PyTorch with DistributedDataParallel.

    torchrun --nproc-per-node 2 tools/train_ddp.py --pairs pairs.jsonl --output FOLDER

Each process trains on its share of the rows of each batch. The loss is the mean over
the target tokens of the whole batch, as in `fit` on one device.
"""

import argparse
import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

import keras_t5gemma
from keras_t5gemma.data.pair_dataset import PairDataset
from keras_t5gemma.data.text_columns import as_columns


def train(model, optimizer, batches, epochs):
    """Train one process's copy of the model.

    Args:
        model: a `Seq2SeqLM`, the same in all processes.
        optimizer: a Keras optimizer.
        batches: a `PairDataset` of global batches, the same in all processes.
        epochs: passes over the data.
    """
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    variables = model.trainable_variables
    optimizer.build(variables)
    parallel = DistributedDataParallel(model)

    def share(array):
        return keras.ops.convert_to_tensor(array[rank::count])

    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for step in range(batches.num_batches):
            x, labels, weights = keras.tree.map_structure(share, batches[step])
            total = weights.sum()
            torch.distributed.all_reduce(total)
            losses = parallel({**x, "labels": labels}, training=True)["losses"]
            # DDP averages the gradients over processes: hence the factor.
            loss = count * (losses * weights).sum() / total
            parallel.zero_grad()
            loss.backward()
            optimizer.apply([v.value.grad for v in variables], variables)


def check_copies(model):
    """Raise `RuntimeError` if weights differ between processes."""
    for variable in model.weights:
        first = variable.value.detach().clone()
        torch.distributed.broadcast(first, src=0)
        if not torch.equal(first, variable.value):
            raise RuntimeError(f"{variable.path} is not the same in all processes.")


def main():
    """The command: train, and write the preset in the first process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="t5gemma_mini")
    parser.add_argument("--pairs", required=True, help="see `read_pairs`")
    parser.add_argument("--output", required=True, help="folder of the new preset")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="rows of all processes"
    )
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    keras.utils.set_random_seed(0)  # The same data order in all processes.
    model = keras_t5gemma.Seq2SeqLM.from_preset(args.preset)
    columns = as_columns(keras_t5gemma.read_pairs(args.pairs), None)
    batches = PairDataset(
        model.preprocessor, columns, batch_size=args.batch_size, shuffle=True
    )
    train(model, keras.optimizers.AdamW(args.learning_rate), batches, args.epochs)
    check_copies(model)
    if torch.distributed.get_rank() == 0:
        model.save_to_preset(args.output)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

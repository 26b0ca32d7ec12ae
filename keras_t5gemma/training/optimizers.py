"""What an optimizer must be able to do for a model."""

import keras
from keras import ops


def check_optimizer(optimizer, dtype):
    """Raise `ValueError` for an Adam whose variance cannot be held in `dtype`.

    In bfloat16, 0.999 rounds to 1: the second moment never changes and the
    weights never move.
    """
    optimizers = keras.optimizers
    adams = (optimizers.Adam, optimizers.Nadam, optimizers.Lamb)
    if dtype != "bfloat16" or not isinstance(optimizer, adams):
        return
    beta_2 = ops.cast(float(optimizer.beta_2), "bfloat16")
    if float(ops.convert_to_numpy(ops.cast(beta_2, "float32"))) >= 1:
        raise ValueError(
            f"{type(optimizer).__name__} with beta_2={optimizer.beta_2} never moves "
            "bfloat16 weights: beta_2 rounds to 1. Load the model with "
            "dtype='mixed_bfloat16', lower beta_2 to 0.99, or use Adafactor, Lion "
            "or Muon."
        )

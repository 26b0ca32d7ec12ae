import keras
import numpy as np
import pytest
from helpers.models import enlarge, numpy, one_block_config, random_inputs

import keras_t5gemma as kt
from keras_t5gemma.training.callbacks import CrossAttentionWarmUp

STEPS, WARM_UP = 4, 2


class Look(keras.callbacks.Callback):
    """Weights and optimizer after every step."""

    def __init__(self):
        super().__init__()
        self.weights, self.momentums, self.programs = [], [], set()

    def on_train_batch_begin(self, batch, logs=None):
        self.programs.add(self._model.train_function)

    def on_train_batch_end(self, batch, logs=None):
        model = self.model  # On JAX this brings the state into the variables.
        self.weights.append({v.path: numpy(v) for v in model.trainable_variables})
        optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        self.momentums.append(
            {
                v.path: numpy(optimizer._momentums[optimizer._get_variable_index(v)])
                for v in model.trainable_variables
            }
        )


def train(callbacks, dtype="float32", steps=None, **fit_arguments):
    keras.utils.set_random_seed(0)
    lineage = {"needs_warm_up": True}
    backbone = kt.Backbone(one_block_config(), dtype=dtype, lineage=lineage)
    model = kt.Seq2SeqLM(enlarge(backbone))
    settings = {"weight_decay": 0.1, "gradient_accumulation_steps": steps}
    model.compile(optimizer=keras.optimizers.AdamW(1e-3, **settings))
    before = {v.path: numpy(v) for v in model.trainable_variables}
    x = random_inputs(batch=STEPS)
    y = x["decoder_token_ids"]
    look = Look()
    model.fit(
        x,
        y,
        sample_weight=np.ones(y.shape, "float32"),
        batch_size=1,
        shuffle=False,
        callbacks=[*callbacks, look],
        verbose=0,
        **fit_arguments,
    )
    return model, before, look


def moved(before, after):
    return {path for path in before if (before[path] != after[path]).any()}


@pytest.fixture(scope="module")
def plain():
    """What a training without the callback shows."""
    return train([])[2]


@pytest.mark.parametrize("norms", [True, False])
def test_cross_attention_first_then_everything(norms, plain):
    model, before, look = train([CrossAttentionWarmUp(WARM_UP, norms)])
    names = ("cross_attention", "cross_norm") if norms else ("cross_attention",)
    alone = {path for path in before if any(name in path for name in names)}
    assert len(alone) == (6 if norms else 4) * len(model.backbone.decoder.blocks)
    assert moved(before, look.weights[WARM_UP - 1]) == alone
    zeros = {path: np.zeros_like(value) for path, value in before.items()}
    assert moved(zeros, look.momentums[WARM_UP - 1]) == alone
    # Everything, and what is known of the first part goes on.
    assert moved(look.weights[WARM_UP - 1], look.weights[WARM_UP]) == set(before)
    for path in alone:
        kept = 0.9 * look.momentums[WARM_UP - 1][path]
        new = look.momentums[WARM_UP][path] - kept
        assert np.abs(kept).max() > 1e-6
        assert np.abs(new).max() < 10 * np.abs(plain.momentums[0][path]).max()
    assert len(look.programs) == 2
    assert "apply" not in vars(model.optimizer)
    assert not model.backbone.lineage["needs_warm_up"]  # In the next training.


def test_without_steps_nothing_changes(plain):
    _, before, look = train([CrossAttentionWarmUp(0)])
    assert len(look.programs) == 1
    for path in before:
        assert (look.weights[-1][path] == plain.weights[-1][path]).all()


def test_goes_on_where_a_stopped_run_was():
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 0:
                self._model.stop_training = True

    keras.utils.set_random_seed(0)
    model, before, _ = train([CrossAttentionWarmUp(3), Stop()])
    steps = int(model.optimizer.iterations)
    assert steps < 3
    look = Look()
    x = random_inputs(batch=4)
    y = x["decoder_token_ids"]
    weights = np.ones(y.shape, "float32")
    model.fit(
        x,
        y,
        sample_weight=weights,
        batch_size=1,
        callbacks=[CrossAttentionWarmUp(3), look],
        verbose=0,
    )
    alone = {path for path in before if "cross" in path}
    assert moved(before, look.weights[2 - steps]) == alone
    assert moved(before, look.weights[3 - steps]) == set(before)


@pytest.mark.one_backend
def test_accumulated_steps_are_updates():
    """Three batches are an update: the fourth is left, with the warm-up over."""
    _, before, look = train([CrossAttentionWarmUp(1)], steps=3)
    assert moved(before, look.weights[1]) == set()
    assert moved(before, look.weights[2]) == {p for p in before if "cross" in p}
    model, before, _ = train([CrossAttentionWarmUp(2)], steps=3)
    after = {v.path: numpy(v) for v in model.trainable_variables}
    assert moved(before, after) == {p for p in before if "cross" in p}


def test_mixed_float16():
    model, before, look = train([CrossAttentionWarmUp(WARM_UP)], "mixed_float16")
    paths = [v.path for v in model.optimizer.variables]
    assert len(set(paths)) == len(paths)  # Built twice, it has two step counters.
    assert moved(before, look.weights[WARM_UP - 1]) == {
        p for p in before if "cross" in p
    }
    assert moved(before, look.weights[-1]) == set(before)


def test_refuses():
    with pytest.raises(ValueError, match="`steps` must be.*from 0; got -1"):
        CrossAttentionWarmUp(-1)
    model = kt.Seq2SeqLM(kt.Backbone(one_block_config()))
    model.backbone.decoder.trainable = False
    model.compile(optimizer="sgd")
    x = random_inputs()
    with pytest.raises(ValueError, match="needs trainable cross-attention"):
        model.fit(
            x, x["decoder_token_ids"], callbacks=[CrossAttentionWarmUp()], verbose=0
        )

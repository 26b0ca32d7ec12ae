"""Runs of experiments/ that are unlike usual ones, on the backends that make them."""

import importlib.util
from pathlib import Path

import numpy as np
from helpers.models import enlarge, numpy, tiny_config

import keras_t5gemma as kt
from keras_t5gemma.distribution.prediction import compiled
from keras_t5gemma.modeling.inference import inference

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def test_causal_encoders_are_causal_everywhere(monkeypatch):
    """In training, `encode` and generation: later tokens change nothing earlier."""
    monkeypatch.syspath_prepend(EXPERIMENTS)
    spec = importlib.util.spec_from_file_location("run", EXPERIMENTS / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    backbone = kt.Backbone(tiny_config())
    enlarge(backbone)
    ids = np.arange(4, 12, dtype="int32")[None]
    changed = ids.copy()
    changed[0, -1] = 20
    padding = np.ones_like(ids)

    def fast(*inputs):
        with inference():
            return compiled(backbone, ("read", causal), backbone.encode)(*inputs)

    for causal in (True, False):
        with run.encoder_mask(causal):
            for read in (backbone.encode, backbone.encoder, fast):
                before, after = (numpy(read(x, padding)) for x in (ids, changed))
                same = np.abs(before - after)[0, :-1].max() < 1e-5
                assert same == causal
            cache = backbone.make_cache(backbone.encode(ids, padding), padding, 3, 1, 0)
            other = backbone.make_cache(
                backbone.encode(changed, padding), padding, 3, 1, 0
            )
            keys, others = (numpy(c["cross"][0][0])[0, :, :-1] for c in (cache, other))
            assert (np.abs(keys - others).max() < 1e-5) == causal

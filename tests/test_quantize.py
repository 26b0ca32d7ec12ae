import keras
import numpy as np
from conftest import enlarge, max_difference, numpy, random_inputs, tiny_config

import keras_t5gemma as kt


def adapter_change(quantization):
    """What one SGD step does to the LoRA adapters of a model, as one vector."""
    keras.utils.set_random_seed(0)
    model = kt.Seq2SeqLM(enlarge(kt.Backbone(tiny_config()), 4.0))
    if quantization:
        model.quantize(quantization)
    model.enable_lora(4)
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(0, 0.05, variable.shape))
    model.compile(optimizer=keras.optimizers.SGD(1.0))
    before = [numpy(v).copy() for v in model.trainable_variables]
    x = random_inputs()
    y = np.random.default_rng(1).integers(4, 480, (2, 14))
    model.fit(x, y, sample_weight=np.ones((2, 14)), verbose=0)
    after = [numpy(v) for v in model.trainable_variables]
    return np.concatenate([(b - a).ravel() for a, b in zip(before, after, strict=True)])


def test_gradients_through_an_int8_model_point_the_right_way():
    """Trap: through Keras's default int8 head their cosine is about 0."""
    exact, quantised = adapter_change(None), adapter_change("int8")
    norms = np.linalg.norm(exact) * np.linalg.norm(quantised)
    assert exact @ quantised / norms > 0.97


def test_int8_stays_close_and_survives_saving(tokenizer, tmp_path):
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 24, 16)
    model = kt.Seq2SeqLM(enlarge(kt.Backbone(tiny_config()), 4.0), preprocessor)
    x = random_inputs()
    exact = numpy(model(x))
    model.quantize("int8")
    assert model.backbone.decoder.blocks[0].mlp.up.quantization_mode == "int8"
    assert model.backbone.encoder.token_embedding.quantization_mode == "int8"
    quantised = numpy(model(x))
    assert 0 < max_difference(quantised, exact) < 0.1 * np.abs(exact).max()
    assert model.generate("The quick fox", max_length=8)
    model.save_to_preset(str(tmp_path))
    loaded = kt.Seq2SeqLM.from_preset(tmp_path)
    assert max_difference(loaded(x), quantised) < 1e-5

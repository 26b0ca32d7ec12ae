"""Inference from threads: results equal serial ones, and the model stays whole."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
from helpers.models import SENTENCES, numpy, one_block_config

import keras_t5gemma as kt

THREADS = 8
PAIRS = {"encoder_text": SENTENCES, "decoder_text": ["a", "b", "c"] * 2}


@pytest.fixture(scope="module")
def calls(tokenizer):
    """`{name: call}` of three tasks; all texts are truncated."""
    keras.utils.set_random_seed(0)
    config = one_block_config()
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 8, 8)
    encoder = kt.Backbone(kt.T5GemmaConfig(config.encoder, None, 480))
    lm = kt.Seq2SeqLM(kt.Backbone(config), preprocessor)
    embedder = kt.TextEmbedder(encoder, preprocessor)
    classifier = kt.TextClassifier(encoder, preprocessor, num_classes=2)
    return {
        "generate": lambda: lm.generate(SENTENCES[0], max_length=4),
        "stream": lambda: list(lm.stream(SENTENCES[1], max_length=4)),
        "score": lambda: lm.score(SENTENCES, PAIRS["decoder_text"])["log_prob"],
        "predict": lambda: lm.predict(PAIRS, batch_size=3, verbose=0),
        "evaluate": lambda: lm.evaluate(PAIRS, batch_size=3, verbose=0),
        "embed": lambda: embedder.embed(SENTENCES),
        "hidden_states": lambda: numpy(embedder.hidden_states(SENTENCES)[0]),
        "probabilities": lambda: classifier.predict(SENTENCES),
        "classify": lambda: classifier.classify(SENTENCES),
    }


@pytest.mark.filterwarnings("ignore:.*truncated.*")
def test_threads_get_the_results_of_serial_calls(calls):
    expected = {name: call() for name, call in calls.items()}
    names = list(calls)
    start = threading.Barrier(THREADS)

    def work(thread):
        start.wait()
        order = np.random.default_rng(thread).permutation(len(names))[:5]
        mine = [names[i] for i in order]
        return [(name, calls[name]()) for name in mine]

    with ThreadPoolExecutor(THREADS) as pool:
        for results in pool.map(work, range(THREADS)):
            for name, found in results:
                np.testing.assert_array_equal(found, expected[name], err_msg=name)
    assert calls["generate"]() == expected["generate"]
    np.testing.assert_array_equal(calls["embed"](), expected["embed"])


@pytest.mark.one_backend
def test_each_thread_reports_its_own_truncation(tokenizer):
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 8, 8)
    entered = threading.Barrier(2, timeout=10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def work(count):
            with preprocessor.report_truncation():
                entered.wait()
                preprocessor.encoder_rows(SENTENCES[:count])
                entered.wait()

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, (1, 3)))
    found = sorted(str(warning.message).split(" encoder")[0] for warning in caught)
    assert found == ["1 of 1", "3 of 3"]


@pytest.mark.one_backend
def test_fit_reports_the_truncation_of_its_threads(tokenizer):
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 8, 8)

    def work():
        preprocessor.generate_preprocess(SENTENCES[:2])

    with pytest.warns(UserWarning, match="^3 of 3 encoder texts"):
        with preprocessor.report_truncation(all_threads=True):
            preprocessor.generate_preprocess(SENTENCES[0])
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()


def test_inference_beside_fit_fails_clearly_or_works(tokenizer):
    """On JAX Keras trains with the arrays, and the variables have none meanwhile."""
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 64, 8)
    model = kt.Seq2SeqLM(kt.Backbone(one_block_config()), preprocessor)
    model.generate("a fox", max_length=4)
    answers = []

    class Ask(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            with ThreadPoolExecutor(1) as pool:
                try:
                    answers.append(pool.submit(model.generate, "a", 4).result())
                except RuntimeError as error:
                    answers.append(str(error))

    model.fit(PAIRS, batch_size=2, verbose=0, callbacks=[Ask()])
    if keras.config.backend() == "jax":
        assert all("being trained in another thread" in a for a in answers)
    assert len(answers) == 3
    assert isinstance(model.generate("a fox", max_length=4), str)
    assert all(np.isfinite(numpy(v.value)).all() for v in model.weights)

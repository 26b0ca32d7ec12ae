"""Batches of text that users make: how they are padded, and that they train alike."""

import keras
import numpy as np
import pytest
from helpers.models import SENTENCES, one_block_config

import keras_t5gemma as kt
from keras_t5gemma.data.text_batches import map_batch

PAIRS = {
    "encoder_text": [f"{s} {i}" for i in range(4) for s in SENTENCES],
    "decoder_text": [s.split()[-1] for _ in range(4) for s in SENTENCES],
}


class Again:
    """Batches of text that can be iterated more than once, of three widths."""

    batches = [{k: v[i : i + 8] for k, v in PAIRS.items()} for i in (0, 8)]
    batches += [{"encoder_text": ["abc " * 45], "decoder_text": ["abc " * 9]}]

    def __iter__(self):
        return iter(self.batches)


class Numbered(keras.utils.PyDataset):
    """The same batches by number."""

    def __len__(self):
        return len(Again.batches)

    def __getitem__(self, index):
        return Again.batches[index]


@pytest.mark.parametrize("data", [Again, lambda: iter(Again()), Numbered])
def test_batches_of_a_user_train_as_if_padded_to_the_lengths(tokenizer, data):
    def losses(batching):
        keras.utils.set_random_seed(0)
        preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 400, 64)
        model = kt.Seq2SeqLM(kt.Backbone(one_block_config()), preprocessor)
        model.compile(optimizer=keras.optimizers.SGD(0.1))
        arguments = {"batching": batching, "steps_per_epoch": 3, "verbose": 0}
        return model.fit(data(), shuffle=False, **arguments).history["loss"]

    assert np.allclose(losses(None), losses("fixed"), atol=1e-5)


def test_batches_of_a_user_are_padded_little(tokenizer):
    """Short texts of a DataLoader were padded to the preprocessor's lengths."""
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 400, 64)

    def shapes(**kwargs):
        for batch in Again():
            x, labels, weights = map_batch(preprocessor, batch, **kwargs)
            shape = x["decoder_token_ids"].shape
            assert labels.shape == weights.shape == shape
            assert x["decoder_padding_mask"].shape == shape
            assert x["encoder_padding_mask"].shape == x["encoder_token_ids"].shape
            yield x["encoder_token_ids"].shape[1], shape[1]

    counts = [len(ids) for ids in tokenizer.tokenize(["abc " * 45, "abc " * 9])]
    assert 100 < counts[0] <= 200 and 16 < counts[1] < 32
    assert [*shapes()] == [(56, 8), (56, 8), (200, 32)]
    assert [*shapes(batching="fixed")] == 3 * [(400, 64)]
    weighted = (Again.batches[0], None, np.arange(8))
    weights = map_batch(preprocessor, weighted)[2]
    assert (weights[:, 0] == np.arange(8)).all()
    preprocessor.pad_to_multiple_of = 64
    assert [*shapes()] == [(64, 64), (64, 64), (192, 64)]


def test_no_token_is_lost_whatever_the_length(tokenizer):
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 100, 60)
    for count in range(1, 24):
        batch = {"encoder_text": ["a b " * count], "decoder_text": ["c " * count]}
        cut = map_batch(preprocessor, batch)
        whole = map_batch(preprocessor, batch, batching="fixed")
        width = cut[1].shape[1]
        assert (cut[1] == whole[1][:, :width]).all()
        assert cut[2].sum() == whole[2].sum()
        for name, array in cut[0].items():
            assert array.sum() == whole[0][name].sum(), (name, count)

"""Text in files gives the batches of text in memory, to each process its rows."""

import json

import keras
import numpy as np
import pytest
from helpers.models import SENTENCES, one_block_config

import keras_t5gemma as kt
from keras_t5gemma.data.document_dataset import DocumentDataset
from keras_t5gemma.data.pair_dataset import PairDataset
from keras_t5gemma.distribution import process_group

pytestmark = pytest.mark.one_backend
SOURCES = [f"{s} {i}" for i in range(4) for s in SENTENCES]
TARGETS = [s.split()[-1] + " é" for s in SOURCES]
PAIRS = {"encoder_text": SOURCES, "decoder_text": TARGETS}


@pytest.fixture
def folder(tmp_path):
    """Three files of unequal size, with an empty line and an accent in each."""
    rows = [
        json.dumps({"source": s, "target": t, "text": s}, ensure_ascii=False)
        for s, t in zip(SOURCES, TARGETS, strict=True)
    ]
    for name, part in (("a", rows[:3]), ("b", rows[3:15]), ("c", rows[15:])):
        text = "\n\n".join(part) + "\n"
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def preprocessor(tokenizer, *lengths, **kwargs):
    return kt.Seq2SeqLMPreprocessor(tokenizer, *(lengths or (32, 8)), **kwargs)


def make(kind, *args, **kwargs):
    keras.utils.set_random_seed(3)  # What the orders come from.
    return kind(*args, **kwargs)


def assert_equal(batch, expected):
    batch, expected = keras.tree.flatten(batch), keras.tree.flatten(expected)
    for found, array in zip(batch, expected, strict=True):
        assert found.dtype == array.dtype and (found == array).all()


@pytest.mark.parametrize("batching", ["bucketed", "packed", "fixed"])
def test_batches_are_those_of_the_same_pairs_in_memory(tokenizer, folder, batching):
    args = {"batch_size": 5, "shuffle": True, "batching": batching}
    files = make(kt.PairFiles, preprocessor(tokenizer), folder, **args)
    memory = make(PairDataset, preprocessor(tokenizer), PAIRS, **args)
    assert files.batches_an_epoch() == memory.batches_an_epoch() > 2
    for epoch in (0, 3):
        files.set_epoch(epoch)
        memory.set_epoch(epoch)
        for step in (*range(files.num_batches), 1):  # In order, then anywhere.
            assert_equal(files[step], memory[step])
            assert files.counts(step) == memory.counts(step)


def test_a_training_goes_on_at_a_batch_and_with_fewer_steps(tokenizer, folder):
    whole = make(kt.PairFiles, preprocessor(tokenizer), folder, batch_size=5)
    again = make(kt.PairFiles, preprocessor(tokenizer), folder, batch_size=5)
    again.start_at(2, 3)
    whole.set_epoch(2)
    again.set_epoch(2)
    assert again.num_batches == whole.num_batches - 3
    assert_equal(again[0], whole[3])
    short = make(kt.PairFiles, preprocessor(tokenizer), folder, batch_size=5, steps=2)
    whole.set_epoch(0)
    short.set_epoch(1)
    assert_equal(short[1], whole[3])


def test_plain_text_is_cut_and_drawn_as_in_memory(tokenizer, folder, tmp_path):
    pre = preprocessor(tokenizer, 12, 12, objective=kt.objectives.PrefixLM())
    texts = ["x", *SOURCES]  # One token is no document.
    args = {"batch_size": 4, "shuffle": True, "batching": "packed"}
    memory = make(DocumentDataset, pre, {"text": texts}, **args)
    assert len(memory.pieces) > len(SOURCES)
    path = tmp_path / "texts.txt"
    path.write_text("x\n\n" + "\n".join(SOURCES) + "\n", encoding="utf-8")
    for paths in (path, sorted(folder.glob("*.jsonl"))):
        files = make(kt.TextFiles, pre, paths, batch_size=4)
        for epoch in (0, 1):
            files.set_epoch(epoch)
            memory.set_epoch(epoch)
            for step in range(memory.num_batches):
                assert_equal(files[step], memory[step])


def test_processes_share_files_and_rows(tokenizer, folder, monkeypatch):
    """Two processes in turn: the first pass is split, the rows of a batch are too."""
    alone = make(kt.PairFiles, preprocessor(tokenizer), folder, batch_size=6)
    counts = [alone.counts(step) for step in range(alone.num_batches)]
    expected = [alone[step] for step in range(alone.num_batches)]
    monkeypatch.setattr(process_group, "process_count", lambda: 2)
    monkeypatch.setattr(process_group, "from_first", lambda value: value)
    brought, read = [], []

    def gather(data):
        brought.append(data)
        return [data]

    monkeypatch.setattr(process_group, "gather", gather)
    for number in (0, 1):
        monkeypatch.setattr(process_group, "process_index", lambda: number)  # noqa: B023
        files = make(kt.PairFiles, preprocessor(tokenizer), folder, batch_size=6)
        read.append(len(files.lengths[0]))
    assert read == [3 + 9, 12]
    # What both brought: the largest messages, of 4 numbers a row.
    tables = sorted(brought, key=len)[-2:]
    assert sorted(len(table) // 32 for table in tables) == [12, 12]
    shares = []
    for number in (0, 1):
        monkeypatch.setattr(process_group, "process_index", lambda: number)  # noqa: B023

        def gathered(data):
            return tables[::-1] if len(data) > 300 else [data]

        monkeypatch.setattr(process_group, "gather", gathered)
        rows = slice(3 * number, 3 * number + 3)
        monkeypatch.setattr(process_group, "local_rows", lambda count: rows)  # noqa: B023
        files = make(kt.PairFiles, preprocessor(tokenizer), folder, batch_size=6)
        shares.append([files[step] for step in range(files.num_batches)])
        assert [files.counts(step) for step in range(len(counts))] == counts
    assert len(shares[0]) == len(shares[1]) == len(expected)
    for step, (first, second) in enumerate(zip(*shares, strict=True)):
        both = keras.tree.map_structure(lambda *x: np.concatenate(x), first, second)
        assert_equal(both, expected[step])


def test_fit_trains_on_files(tokenizer, folder):
    pre = preprocessor(tokenizer)
    model = kt.Seq2SeqLM(kt.Backbone(one_block_config()), pre)
    model.compile(optimizer=keras.optimizers.Adam(1e-2))
    data = make(kt.PairFiles, pre, folder, batch_size=8, steps=2)
    history = model.fit(data, epochs=2, verbose=0).history
    assert history["loss"][1] < history["loss"][0]
    assert 0 < history["padding"][0] < 1


def test_refuses(tokenizer, folder, tmp_path):
    pre = preprocessor(tokenizer)
    for paths in ([], tmp_path / "missing.jsonl", tmp_path / "x.csv"):
        with pytest.raises(ValueError, match="`paths` must be files that end in"):
            kt.PairFiles(pre, paths)
    with pytest.raises(ValueError, match="c.jsonl, byte 0: .*KeyError 'answer'"):
        kt.PairFiles(pre, folder / "c.jsonl", target="answer")
    with pytest.raises(ValueError, match="`threads`.*got 0"):
        kt.PairFiles(pre, folder, threads=0)
    bad = tmp_path / "d.jsonl"
    bad.write_text('{"source": "a", "target": 5}\n')
    with pytest.raises(ValueError, match="d.jsonl, byte 0: .*must be strings"):
        kt.PairFiles(pre, bad)
    bad.write_text("")
    with pytest.raises(ValueError, match="`paths` has no rows"):
        kt.PairFiles(pre, bad)
    bad.write_text('{"source": "a b", "target": "c"}\n')
    data = kt.PairFiles(pre, bad)
    bad.write_text('{"source": "a b c", "target": "c"}\n')
    with pytest.raises(ValueError, match="d.jsonl has changed since it was first read"):
        data[0]

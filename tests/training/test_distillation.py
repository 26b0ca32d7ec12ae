"""Learning from a teacher: the loss by its definition, the data, the files."""

import json

import keras
import numpy as np
import pytest
from helpers.losses import LABELS, SIZE, STATES, TABLE, TOKENS, value_and_gradients
from helpers.models import SENTENCES, enlarge, max_difference, numpy, one_block_config
from helpers.teacher import VOCABULARY, make_teacher
from keras import ops

import keras_t5gemma as kt
from keras_t5gemma.data import objective_pairs
from keras_t5gemma.data.document_dataset import DocumentDataset
from keras_t5gemma.data.objectives import UL2, PrefixLM
from keras_t5gemma.tokenization.token_ids import pad
from keras_t5gemma.training import chunked_cross_entropy
from keras_t5gemma.training.chunked_cross_entropy import TeacherTargets, top_choices

RNG = np.random.default_rng(1)
THEIR_STATES = RNG.normal(size=(TOKENS, 5)).astype("float32")
THEIR_TABLE = 2 * RNG.normal(size=(SIZE, 5)).astype("float32")
SHARES = RNG.choice([0.0, 0.3, 1.0], TOKENS).astype("float32")
TEXTS = [*SENTENCES, " ".join(SENTENCES), "a", "ab"]


def softmax(logits):
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def make_student(tokenizer, objective, lengths=(24, 20)):
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, *lengths, objective=objective)
    model = kt.Seq2SeqLM(kt.Backbone(one_block_config()), preprocessor)
    enlarge(model.backbone)
    return model


def objective_of(name, tokenizer):
    return PrefixLM() if name == "prefixlm" else UL2.from_tokenizer(tokenizer)


def plain_loss(model, teacher, texts, temperature=1.0, top_k=None, weight=0.0):
    """By the definition: one text after the other, every logit there at once."""
    preprocessor = model.preprocessor
    start = preprocessor.tokenizer.start_token_id
    batches = DocumentDataset(preprocessor, {"text": texts}, batching="packed")
    numbers = np.arange(len(batches.pieces))
    sources, targets = objective_pairs.make(
        preprocessor, batches.pieces, numbers, batches.is_last
    )
    in_text = preprocessor.objective.ends_with_the_text(numbers)
    own = {*preprocessor.objective.sentinels, *batches.preprocessor.stop_ids}
    total = count = 0
    for i in numbers:
        text = batches.pieces[i].tolist()
        ids, mask = pad([[start, *text]], 48)
        states = teacher.backbone({"token_ids": ids, "padding_mask": mask})
        theirs = numpy(teacher.backbone.token_embedding(states, reverse=True))[0]
        target = targets[i].tolist()
        encoder = pad([sources[i].tolist()], 24)
        decoder = pad([[start, *target[:-1]]], 20)
        names = ("token_ids", "padding_mask")
        inputs = {f"encoder_{n}": x for n, x in zip(names, encoder, strict=True)}
        inputs |= {f"decoder_{n}": x for n, x in zip(names, decoder, strict=True)}
        mine = numpy(model(inputs))[0]
        place = 0
        for t, label in enumerate(target):
            label_loss = -log_softmax(mine[t])[label]
            total, count = total + label_loss, count + 1
            if in_text[i]:
                place = len(text) - len(target) + t
                place += label == preprocessor.end_id
                if target[-1] == preprocessor.end_id and label != preprocessor.end_id:
                    place += 1
            elif label in own:
                continue
            else:  # Spans are in order: the next such token of the text.
                place = text.index(label, place)
            logits = theirs[place] / temperature
            if not in_text[i]:
                place += 1
            if top_k is not None:
                least = np.sort(logits)[-top_k]
                logits = np.where(logits >= least, logits, -np.inf)
            loss = -(softmax(logits) * log_softmax(mine[t] / temperature)).sum()
            total += (1 - weight) * (temperature**2 * loss - label_loss)
    return total / count


def step_loss(model, loss, texts=TEXTS, batching="packed", batch_size=64):
    """The loss of a training step that does not move anything."""
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss=loss)
    history = model.fit(
        texts, batching=batching, batch_size=batch_size, shuffle=False, verbose=0
    )
    return history.history["loss"][0]


@pytest.mark.parametrize("part", [2**24, TOKENS * 6])
@pytest.mark.parametrize("heat", [1.0, 2.5])
@pytest.mark.parametrize("few", [False, True])
def test_values_and_gradients_are_the_definition(monkeypatch, part, heat, few):
    monkeypatch.setattr(chunked_cross_entropy, "logits_at_once", lambda _: part)
    theirs = np.tanh(THEIR_STATES @ THEIR_TABLE.T / 9.0) * 9.0 / heat
    ids = np.argsort(-theirs, axis=1)[:, :4].astype("int32")
    ids[0] = ids[0, 0]  # The same row of the table more than once.
    ids[1:3] = ids[1]
    target = softmax(theirs)
    if few:
        of_ids = softmax(np.take_along_axis(theirs, ids, 1))
        target = np.zeros_like(theirs)
        np.add.at(target, (np.arange(TOKENS)[:, None], ids), of_ids)
    share = ops.convert_to_tensor(SHARES)
    dense = [ops.convert_to_tensor(x) for x in (THEIR_STATES, THEIR_TABLE)]
    if few:
        sparse = [ops.convert_to_tensor(x) for x in (ids, of_ids.astype("float32"))]
        teacher = TeacherTargets(share, heat, ids=sparse[0], shares=sparse[1])
    else:
        teacher = TeacherTargets(share, heat, *dense, cap=9.0)

    def plain(states, table, labels):
        logits = ops.tanh(ops.matmul(states, ops.transpose(table)) / 5.0) * 5.0
        normalizer = ops.logsumexp(logits, axis=1)
        chosen = ops.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        label = 0.9 * (normalizer - chosen)
        label = label + 0.1 * (normalizer - ops.mean(logits, axis=1))
        log_probs = ops.log_softmax(logits / heat)
        taught = -ops.sum(ops.convert_to_tensor(target) * log_probs, axis=1)
        value = share * label + (1 - share) * heat**2 * taught
        hits = ops.cast(ops.argmax(logits, axis=1), "int32") == labels
        return (
            value + 1e-2 * ops.square(normalizer),
            chosen - normalizer,
            ops.cast(hits, "float32"),
        )

    def ours(states, table, labels):
        return chunked_cross_entropy.token_losses(
            states, table, labels, 5.0, 0.1, 1e-2, teacher=teacher
        )

    arrays = [ops.convert_to_tensor(x) for x in (STATES, TABLE)]
    found = value_and_gradients(ours, *arrays)
    for got, expected in zip(found, value_and_gradients(plain, *arrays), strict=True):
        assert max_difference(got, expected) < 1e-5 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("part", [2**24, TOKENS * 6])
def test_choices_are_the_largest(monkeypatch, part):
    parts = chunked_cross_entropy.chunk_count
    monkeypatch.setattr(
        chunked_cross_entropy, "chunk_count", lambda v, n, _: parts(v, n, part)
    )
    arrays = [ops.convert_to_tensor(x) for x in (THEIR_STATES, THEIR_TABLE)]
    ids, log_probs = (numpy(x) for x in top_choices(*arrays, 9.0, 7))
    logits = np.tanh(THEIR_STATES @ THEIR_TABLE.T / 9.0) * 9.0
    assert (ids == np.argsort(-logits, axis=1)[:, :7]).all()
    expected = np.take_along_axis(log_softmax(logits), ids, 1)
    assert max_difference(log_probs, expected) < 1e-5


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("prefixlm", {}),
        ("prefixlm", {"temperature": 2.0, "top_k": 5}),
        ("ul2", {"label_weight": 0.25}),
    ],
)
def test_a_step_is_the_plain_implementation(tokenizer, name, options):
    model = make_student(tokenizer, objective_of(name, tokenizer))
    teacher = make_teacher()
    kept = [numpy(v).copy() for v in teacher.backbone.weights]
    loss = step_loss(model, kt.Distillation(teacher, **options))
    weight = options.pop("label_weight", 0.0)
    expected = plain_loss(model, teacher, TEXTS, weight=weight, **options)
    assert abs(loss - expected) < 1e-5 * expected
    for before, variable in zip(kept, teacher.backbone.weights, strict=True):
        assert (before == numpy(variable)).all()


@pytest.mark.parametrize(
    "batching", ["packed", pytest.param("fixed", marks=pytest.mark.one_backend)]
)
def test_on_disk_or_in_memory_is_the_same(tokenizer, tmp_path, batching):
    model = make_student(tokenizer, UL2.from_tokenizer(tokenizer))
    teacher = make_teacher()
    scores = kt.write_teacher_scores(
        tmp_path / "scores", teacher, model.preprocessor, TEXTS, top_k=6, batch_size=3
    )
    assert scores.ids.shape == scores.log_probs.shape == (len(scores.ids), 6)
    for top_k in (None, 3):
        live = kt.Distillation(teacher, top_k=top_k or 6)
        kept = kt.Distillation(kt.TeacherScores(tmp_path / "scores"), top_k=top_k)
        found = [step_loss(model, loss, TEXTS, batching, 4) for loss in (live, kept)]
        assert abs(found[0] - found[1]) < 1e-3  # They lie there as float16.


@pytest.mark.one_backend
def test_a_student_comes_near_its_teacher(tokenizer):
    model = make_student(tokenizer, PrefixLM())
    teacher = make_teacher()
    model.compile(optimizer=keras.optimizers.Adam(3e-3), loss=kt.Distillation(teacher))
    before = [numpy(v).copy() for v in teacher.backbone.weights]
    history = model.fit(TEXTS, batch_size=4, epochs=12, verbose=0).history
    assert history["loss"][-1] < history["loss"][0] - 0.3
    for array, variable in zip(before, teacher.backbone.weights, strict=True):
        assert (array == numpy(variable)).all()
    # Validation is against the labels, with a teacher or without.
    pairs = model.evaluate(TEXTS, return_dict=True, verbose=0)
    model.compile(loss=kt.TokenCrossEntropy())
    again = model.evaluate(TEXTS, return_dict=True, verbose=0)
    assert abs(pairs["loss"] - again["loss"]) < 1e-5


@pytest.mark.one_backend
def test_the_teacher_is_not_saved(tokenizer, tmp_path):
    model = make_student(tokenizer, PrefixLM())
    loss = kt.Distillation(make_teacher(), temperature=2.0)
    model.compile(optimizer=keras.optimizers.Adam(1e-3), loss=loss)
    count = len(model.weights)
    model.fit(TEXTS[:4], verbose=0)
    assert len(model.weights) == count
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.chunked_loss.temperature == 2.0
    loaded.preprocessor = model.preprocessor
    with pytest.raises(ValueError, match="compile the model again"):
        loaded.fit(TEXTS[:4], verbose=0)


@pytest.mark.one_backend
@pytest.mark.parametrize("name", ["prefixlm", "ul2"])
def test_places_are_those_of_the_tokens(tokenizer, name):
    model = make_student(tokenizer, objective_of(name, tokenizer))
    batches = DocumentDataset(model.preprocessor, {"text": TEXTS}, batching="packed")
    pieces, numbers = batches.pieces, np.arange(len(batches.pieces))
    in_text = model.preprocessor.objective.ends_with_the_text(numbers)
    for epoch in (0, 3):
        arguments = (numbers, batches.is_last, epoch)
        _, targets = objective_pairs.make(model.preprocessor, pieces, *arguments)
        places = objective_pairs.places(model.preprocessor, pieces.lengths, *arguments)
        assert (places.lengths == targets.lengths).all()
        own = {*model.preprocessor.objective.sentinels.tolist()}
        ends = 0
        for i in numbers:
            text = pieces[i].tolist()
            for place, token in zip(places[i], targets[i], strict=True):
                if place < 0:
                    assert token in {*own, model.preprocessor.end_id}
                elif place == len(text):
                    assert token == model.preprocessor.end_id
                    assert in_text[i]  # Not the end of a list of spans.
                    ends += 1
                else:
                    assert token == text[place]
        assert ends > 0


@pytest.mark.one_backend
def test_refusals(tokenizer, tmp_path):
    model = make_student(tokenizer, PrefixLM())
    for options, name in (
        ({"temperature": 0}, "temperature"),
        ({"label_weight": 2}, "label_weight"),
        ({"top_k": 0}, "top_k"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
    ):
        with pytest.raises(ValueError, match=name):
            kt.Distillation(make_teacher(), **options)
    with pytest.raises(ValueError, match="CausalLM"):
        kt.Distillation(model)
    other = kt.Distillation(make_teacher(VOCABULARY - 8))
    with pytest.raises(ValueError, match="vocabulary"):
        step_loss(model, other)
    with pytest.raises(ValueError, match="vocabulary"):
        kt.write_teacher_scores(
            tmp_path / "a", make_teacher(VOCABULARY - 8), model.preprocessor, TEXTS
        )
    assert not (tmp_path / "a").exists()
    few = TeacherTargets(ops.convert_to_tensor(SHARES), 1.0, THEIR_STATES)
    few.table = THEIR_TABLE[:-1]
    with pytest.raises(ValueError, match="each of the 96 ids.*it has 95"):
        chunked_cross_entropy.token_losses(STATES, TABLE, LABELS, teacher=few)
    loss = kt.Distillation(make_teacher())
    model.compile(loss=loss)
    without = DocumentDataset(model.preprocessor, {"text": TEXTS}, batching="packed")
    with pytest.raises(ValueError, match="Distillation needs plain text"):
        model.fit(without)
    with pytest.raises(ValueError, match="metrics"):
        model.compile(loss=loss, metrics=["accuracy"])
    model.preprocessor.objective = None
    model.compile(loss=loss)
    with pytest.raises(ValueError, match="objective"):
        model.fit([("a", "b")], verbose=0)


@pytest.mark.one_backend
def test_scores_of_other_texts_or_files_are_refused(tokenizer, tmp_path):
    model = make_student(tokenizer, PrefixLM())
    folder = tmp_path / "scores"
    arguments = (make_teacher(), model.preprocessor)
    with pytest.raises(ValueError, match="top_k"):
        kt.write_teacher_scores(folder, *arguments, TEXTS, top_k=0)
    with pytest.raises(ValueError, match="has no teacher scores"):
        kt.TeacherScores(folder)
    scores = kt.write_teacher_scores(folder, *arguments, TEXTS, top_k=4)
    with pytest.raises(ValueError, match="top_k"):
        kt.Distillation(scores, top_k=5)
    for texts, lengths in ((TEXTS[1:], (24, 20)), (TEXTS, (16, 16))):
        other = make_student(tokenizer, PrefixLM(), lengths)
        with pytest.raises(ValueError, match="other texts"):
            step_loss(other, kt.Distillation(scores), texts)
    with open(folder / "ids.npy", "r+b") as file:
        file.seek(-1, 2)
        byte = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ValueError, match="checksum"):
        kt.TeacherScores(folder)
    about = json.loads((folder / "teacher.json").read_text())
    assert set(about["sha256"]) == {"ids.npy", "log_probs.npy"}

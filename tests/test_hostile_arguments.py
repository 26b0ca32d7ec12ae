"""Wrong values for every argument of the public names: refused by name, at once."""

import itertools
import re
import signal
import warnings

import pytest
from helpers import hostile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import keras_t5gemma as kt

pytestmark = pytest.mark.one_backend
EXAMPLES = 250  # Of each group of calls.
SECONDS = 20  # Of processor time, for one call: what never ends is stopped.


@pytest.fixture(scope="module")
def shared(tokenizer, tmp_path_factory):
    return hostile.Shared(tokenizer, tmp_path_factory.mktemp("hostile"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Text is a valid path.


class TooLong(BaseException):
    pass


def _too_long(*_):
    raise TooLong


def outcome(call, argument, value):
    """Why a call with a wrong value does not end as it should, or `None`."""
    before = signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        call.function(**{**call.valid, argument: value})
    except (ValueError, TypeError) as error:
        names = [re.escape(name) for name in (argument, *call.also)]
        if not re.search(rf"\b({'|'.join(names)})\b", str(error)):
            return f"{type(error).__name__} without the name: {error}"
        return None
    except FileNotFoundError:
        return None if isinstance(value, str) else "FileNotFoundError"
    except (Exception, TooLong) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    if argument in call.numbers and hostile.is_never_a_number(value):
        return "accepted"
    return None


@pytest.mark.parametrize("group", hostile.GROUPS, ids=lambda g: g.__name__)
def test_wrong_values_are_refused_by_name(shared, group):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calls = group(shared)
        for call in calls:
            if call.runs:
                call.function(**call.valid)  # What is replaced was valid.
    values = range(len(hostile.VALUES))
    cases = [(c, a, v) for c in calls for a in c.arguments for v in values]

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(cases))
    def check(case):
        call, argument, number = case
        value = hostile.VALUES[number]()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            problem = outcome(call, argument, value)
        shown = type(value).__name__
        assert not problem, f"{call.name}({argument}={shown}, {number}): {problem}"

    check()


@pytest.mark.parametrize("depth", [70, 5000])
def test_lists_in_lists(shared, depth):
    value, model = hostile.nested(depth), shared.model
    embedder = kt.TextEmbedder(shared.tower, shared.plain)
    ids = {**shared.plain(hostile.PAIRS)[0], "encoder_token_ids": value}
    for name, function in (
        ("encoder_text", model.generate),
        ("encoder_token_ids", lambda _: model.generate(ids)),
        ("encoder_token_ids", lambda _: model.fit(ids, [[1]])),
        ("encoder_token_ids", lambda _: model.evaluate(ids, [[1]])),
        ("encoder_token_ids", lambda _: model.predict(ids)),
        ("encoder_text", lambda value: model.score(value, value)),
        ("x", model.fit),
        ("x", model.evaluate),
        ("x", model.predict),
        ("texts", embedder.embed),
        ("text", shared.tokenizer.tokenize),
        ("token_ids", shared.tokenizer.detokenize),
        ("predictions", lambda value: kt.score_texts(value, value)),
        ("path", kt.read_pairs),
        ("num_layers", lambda value: kt.StackConfig(value, 8, 8, 2, 1, 4)),
    ):
        with pytest.raises(ValueError, match=rf"`{name}\b"):
            function(value)


def test_endless_data_needs_steps(shared):
    endless = (hostile.PAIRS for _ in itertools.count())
    for method in (shared.model.fit, shared.model.evaluate, shared.model.predict):
        with pytest.raises(ValueError, match="`x` is an iterator.*`steps_per_epoch`"):
            method(endless)
    shared.model.fit(endless, steps_per_epoch=2, verbose=0)


def test_many_devices_are_refused_at_once(shared):
    with pytest.raises(ValueError, match="`devices` must be a whole number.*got 9223"):
        kt.plan(shared.config, 2**63, "1GB", 8, 16)

"""Chat templates of checkpoints, and ours as transformers renders them."""

import json
import time
import warnings

import pytest
from helpers.models import tiny_model

import keras_t5gemma as kt
from keras_t5gemma.tokenization import chat_template

pytestmark = pytest.mark.one_backend
pytest.importorskip("jinja2")

INSTRUCTION = chat_template.INSTRUCTION_TEMPLATE
# In the manner of Gemma's published ones.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + "
    "'<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% endfor %}"
)


def folder_with(path, proto, **fields):
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "t5gemma"}')
    (path / "tokenizer.model").write_bytes(proto)
    (path / "tokenizer_config.json").write_text(json.dumps(fields))
    return path


@pytest.mark.parametrize(
    ("template", "bos", "expected"),
    [
        (GEMMA, "", "instruction"),
        (GEMMA, "<bos>", "<bos>" + INSTRUCTION),
        (GEMMA, {"content": "<bos>", "lstrip": False}, "<bos>" + INSTRUCTION),
        (GEMMA.removeprefix("{{ bos_token }}"), "<bos>", "instruction"),
        (GEMMA.replace("['role']", ".role"), "", "instruction"),
        ([{"name": "default", "template": GEMMA}], "", "instruction"),
    ],
)
def test_the_turns_of_gemma_are_the_template(
    tmp_path, proto, template, bos, expected, monkeypatch
):
    folder = folder_with(
        tmp_path / "x", proto, chat_template=template, bos_token=bos, eos_token="<eos>"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = kt.Seq2SeqLMPreprocessor.from_preset(folder)
        assert found.template == expected
        assert found.end_id == found.tokenizer.end_of_turn_id
        plain = kt.Seq2SeqLMPreprocessor.from_preset(folder, template=None)
        assert plain.template is None
    (folder / "chat_template.jinja").write_text(CHATML)  # It is preferred.
    with pytest.warns(UserWarning, match=r"not Gemma's turns.*im_start\|>user"):
        assert kt.Seq2SeqLMPreprocessor.from_preset(folder).template is None


def test_a_template_in_a_file(tmp_path, proto):
    folder = folder_with(tmp_path / "x", proto, bos_token="<bos>")
    (folder / "chat_template.jinja").write_text(GEMMA)
    found = kt.Seq2SeqLMPreprocessor.from_preset(folder)
    assert found.template == "<bos>" + INSTRUCTION
    ids = found.generate_preprocess("A board")["encoder_token_ids"][0]
    assert ids[:2].tolist() == [2, found.tokenizer.start_of_turn_id]


DOUBLED = "{% set x = 'abcdefghi' %}" + "{% set x = x + x %}" * 11


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'ab' * 1000000000 }}{{ messages[0].content }}",
        "{{ 'ab' ~ messages[0].content }}",
        "{% for i in range(100000) %}x{% endfor %}{{ messages[0].content }}",
        "{% for a in 'x' %}{% for b in 'x' %}{% endfor %}{% endfor %}",
        "{{ messages[0].content.ljust(1000000000) }}",
        "{{ messages[0].content | center(1000000000) }}",
        "{{ ''.__class__.__mro__ }}{{ messages[0].content }}",
        "{{ cycler.__init__.__globals__ }}{{ messages[0].content }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set x = 'a' %}" + "{% set x = x + x %}" * 100 + "{{ x }}",
        DOUBLED + "{{ x }}{{ x }}{{ messages[0].content }}",
        DOUBLED + "{% for c in x %}{% endfor %}{{ messages[0].content }}",
        "{% set a = messages %}{% set a = 'x' %}{% for c in a %}{% endfor %}"
        "{{ messages[0].content }}",
        "{% for messages in messages %}{{ messages.content }}{% endfor %}",
        "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
        "{{ 'a'" + " + 'a'" * 3000 + " }}",
        "{% if 1 %}" * 150 + "{{ messages[0].content }}" + "{% endif %}" * 150,
        "{{ 1 / 0 }}",
        "{{ messages[7].content }}",
        "{{ messages",
        "{{ messages[0].content }}" * 2,
        "no text",
        " " * 10**6,
    ],
)
def test_templates_that_need_more_are_not_rendered(template):
    start = time.monotonic()
    assert chat_template.render(template, {"bos_token": "<bos>"}) is None
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "loop",
    [
        "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}"
        "{% for m in rest %}{{ m.content | trim }}{% endfor %}",
        "{% for m in messages[0:] %}{{ m['content'] + '' }}{% endfor %}",
        "{% set a = messages %}{% for m in a if m %}{{ m.content }}{% endfor %}",
    ],
)
def test_loops_over_messages_are_rendered(loop):
    assert chat_template.render("Say: " + loop, {}) == "Say: {text}"


def test_wrong_values_name_the_file(tmp_path, proto):
    for i, wrong in enumerate((5, ["x"], [{"template": "x"}], {"default": "x"})):
        folder = folder_with(tmp_path / str(i), proto, chat_template=wrong)
        with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
            kt.Seq2SeqLMPreprocessor.from_preset(folder)


TEXT = "  A <b>board</b> {x} 'of' \"two\"\n\\n\U0001f98a players? "


@pytest.mark.parametrize(
    "template",
    [
        "instruction",
        "<bos>" + INSTRUCTION,
        'To \\n "Italian" \u00e9\U0001f98a }} {{ {% x %} {# #}:\n{text}\n\t\'\\ =>',
        "{text}",
    ],
)
def test_transformers_renders_the_export_to_our_text(tmp_path, tokenizer, template):
    transformers = pytest.importorskip("transformers")
    model = tiny_model(tokenizer, template=template)
    model.preprocessor.encoder_sequence_length = 100
    model.save_to_huggingface(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": TEXT}]
    rendered = reference.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    ours = chat_template.TEMPLATES.get(template, template).replace("{text}", TEXT)
    assert rendered == ours
    again = kt.Seq2SeqLMPreprocessor
    if "<start_of_turn>" in template or template == "instruction":
        assert again.from_preset(tmp_path).template == template
    else:
        with pytest.warns(UserWarning, match="not Gemma's turns"):
            assert again.from_preset(tmp_path).template is None


def test_turns_of_a_conversation(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    tiny_model(tokenizer, template="instruction").save_to_huggingface(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": role[0]} for role in roles]
    turn = "<start_of_turn>{}\n{}<end_of_turn>\n"
    names = (("user", "u"), ("model", "a"), ("user", "u"))
    expected = "".join(turn.format(*each) for each in names)
    assert reference.apply_chat_template(messages, tokenize=False) == expected


def test_without_a_template_no_chat_template_is_exported(tmp_path, tokenizer):
    tiny_model(tokenizer).save_to_huggingface(tmp_path)
    assert "chat_template" not in (tmp_path / "tokenizer_config.json").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kt.Seq2SeqLMPreprocessor.from_preset(tmp_path).template is None

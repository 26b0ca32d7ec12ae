"""Chat templates of transformers folders, to and from templates of the preprocessor."""

import json
import warnings
from typing import Any

from keras_t5gemma.checkpoints import presets
from keras_t5gemma.checkpoints.hub import get_file
from keras_t5gemma.utils.checks import json_object, shown
from keras_t5gemma.utils.files import named_values, read_text

INSTRUCTION_TEMPLATE = (
    "<start_of_turn>user\n{text}<end_of_turn>\n<start_of_turn>model\n"
)
TEMPLATES = {"instruction": INSTRUCTION_TEMPLATE}
# The turns of Gemma with and without bos: a model trained on one expects that one.
_GEMMA = {
    INSTRUCTION_TEMPLATE: "instruction",
    "<bos>" + INSTRUCTION_TEMPLATE: "<bos>" + INSTRUCTION_TEMPLATE,
}
_LONGEST = 20_000  # Characters of a chat template, and of what it renders to.
_TEXT = "q7X of 3"
# What a chat template for turns needs; anything else could run or grow without bound.
_FILTERS = ("trim", "string", "length")
_METHODS = ("strip", "lstrip", "rstrip")

# transformers renders it to the turns of Gemma, without bos as the encoder expects.
_TURNS = (
    "{% for message in messages %}{{ '<start_of_turn>' + "
    "('model' if message['role'] == 'assistant' else message['role']) + '\\n' + "
    "message['content'] + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


def template_of(source: presets.Source) -> str | None:
    """The template of a checkpoint; a warning tells of a chat template not used.

    Returns:
        `"instruction"`, a template with `{text}`, or `None` for plain text: the saved
        one of a preset of this package; else by the checkpoint's chat template if it is
        Gemma's turns, or by the exact name of a published checkpoint, see
        `Source.is_instruction_tuned`.
    """
    if source.format == presets.KERAS:
        saved = source.read_json("preprocessor.json", default={})
        return saved.get("config", {}).get("template")
    if source.is_instruction_tuned:
        return "instruction"
    found = read(source.location)
    if found is None:
        return None
    rendered = render(*found)
    if rendered in _GEMMA:
        return _GEMMA[rendered]
    _warn(source, rendered)
    return None


def read(location: str) -> tuple[str, dict[str, str]] | None:
    """The chat template of a folder or handle and its special tokens by name.

    `None` if there is none.

    Raises:
        ValueError: naming the file, for a value that is not a template.
    """
    try:
        fields = presets.read_json(location, "tokenizer_config.json", default={})
    except OSError:  # Not downloaded: then the weights are not either.
        fields = {}
    with named_values(f"{location}: tokenizer_config.json"):
        template = fields.get("chat_template")
        if isinstance(template, list):  # Several by name.
            by_name = {json_object(t, "chat_template")["name"]: t for t in template}
            template = by_name.get("default", {}).get("template")
        if not isinstance(template, str | None):
            raise ValueError(
                f"`chat_template` must be a string; got {shown(template)}."
            )
        tokens = {}
        for name, token in fields.items():
            content = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(content, str):
                tokens[name] = content
    try:
        template = read_text(get_file(location, "chat_template.jinja"))
    except OSError:  # There is none; transformers prefers it.
        pass
    return (template, tokens) if template else None


def render(template: str, tokens: dict[str, str]) -> str | None:
    """A chat template as a template of the preprocessor, with one `{text}`.

    It is rendered for one message of a user, in a sandbox that allows what templates
    of turns need.

    Args:
        template: in the language of Jinja.
        tokens: special tokens by name, e.g. `"bos_token"`.

    Returns:
        `None` for a template that is damaged, needs more than that, or does not hold
        the text once.
    """
    import jinja2

    if len(template) > _LONGEST:
        return None
    environment = _sandbox()
    rendered = ""
    try:
        _check(environment.parse(template))
        messages = [{"role": "user", "content": _TEXT}]
        for part in environment.from_string(template).generate(
            {**tokens, "messages": messages, "add_generation_prompt": True}
        ):
            rendered += part
            if len(rendered) > _LONGEST:
                return None
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError):
        return None
    except (RecursionError, SyntaxError, MemoryError):  # Nested too deeply for Python.
        return None
    if rendered.count(_TEXT) != 1 or "{text}" in rendered:
        return None
    return rendered.replace(_TEXT, "{text}")


def _sandbox():
    """Environment with the settings of transformers, and nothing to call."""
    from jinja2 import sandbox

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "*", "**", "%", "//", "/", "-"])

        def call_binop(self, context, operator, left, right):
            if operator == "+" and isinstance(left, str) and isinstance(right, str):
                if len(left) + len(right) <= _LONGEST:
                    return left + right
            elif operator == "%" and isinstance(left, int) and isinstance(right, int):
                return left % right
            raise sandbox.SecurityError(f"{operator} is not allowed here.")

    def raise_exception(message):
        raise sandbox.SecurityError(message)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True)
    environment.filters = {name: environment.filters[name] for name in _FILTERS}
    environment.globals = {"raise_exception": raise_exception}
    return environment


def _check(tree):
    """Raise `ValueError` for parts of a template that could take long or much memory.

    Texts are joined by `+` alone, whose result is bounded, and loops are over messages.
    """
    from jinja2 import nodes

    allowed = (
        *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.Const, nodes.Name),
        *(nodes.If, nodes.For, nodes.Assign, nodes.Getitem, nodes.Getattr, nodes.Slice),
        *(nodes.Add, nodes.Mod, nodes.Compare, nodes.Operand, nodes.Not, nodes.Neg),
        *(nodes.And, nodes.Or, nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Call),
    )
    lists = {"messages"}

    def is_list(node):
        if isinstance(node, nodes.CondExpr) and node.expr2 is not None:
            return is_list(node.expr1) and is_list(node.expr2)
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            node = node.node
        return isinstance(node, nodes.Name) and node.name in lists

    assignments = list(tree.find_all(nodes.Assign))
    lists.update(getattr(a.target, "name", "") for a in assignments if is_list(a.node))
    for node in tree.find_all(nodes.Node):
        fits = isinstance(node, allowed)
        if isinstance(node, nodes.Assign):  # A list stays one.
            fits = is_list(node.node) or not is_list(node.target)
        if isinstance(node, nodes.Call):
            called = node.node
            is_method = isinstance(called, nodes.Getattr) and called.attr in _METHODS
            is_error = getattr(called, "name", None) == "raise_exception"
            fits = is_method or is_error
        if isinstance(node, nodes.For):
            inner = [n for n in node.find_all(nodes.For) if n is not node]
            fits = is_list(node.iter) and not is_list(node.target)
            fits &= not inner and not node.recursive
        if not fits:
            raise ValueError(f"{type(node).__name__} is not needed for turns.")


def _warn(source, rendered):
    use = "for this one as a template with one {text}"
    if rendered is not None:
        use = f"template={rendered!r} for this one"
    warnings.warn(
        f"The tokenizer files of {source} hold a chat template that is not Gemma's "
        "turns, which is not used: the texts are passed to the model as they are. Load "
        f"it with `Seq2SeqLMPreprocessor.from_preset(..., template=...)`: {use}, "
        "template='instruction' for Gemma's turns; template=None silences this "
        "warning.",
        stacklevel=4,
    )


def write(template: str | None) -> str | None:
    """The chat template that transformers renders to the text of a template.

    Args:
        template: of a `Seq2SeqLMPreprocessor`; `None` has no chat template.
    """
    if template is None:
        return None
    text: Any = TEMPLATES.get(template, template)
    bos = "<bos>" if text.startswith("<bos>") else ""
    if text == bos + INSTRUCTION_TEMPLATE:
        return (f"{{{{ '{bos}' }}}}" if bos else "") + _TURNS
    before, after = (
        json.dumps(part, ensure_ascii=False) for part in text.split("{text}")
    )
    return (
        "{% if messages | length != 1 %}"
        "{{ raise_exception('This template is for one message.') }}{% endif %}"
        "{{ " + before + " + messages[0]['content'] + " + after + " }}"
    )

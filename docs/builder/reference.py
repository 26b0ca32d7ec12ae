"""Pages of the API reference and of the command line."""

import ast
import dataclasses
import json
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "keras_t5gemma"

# Every public name is on one page; a test compares them with the package's.
PAGES = {
    "models": (
        "Models",
        "Load, generate, classify, embed.",
        ["Seq2SeqLM", "GenerationOptions", "TextEmbedder", "TextClassifier"]
        + ["TextTower", "nearest", "cosine_similarity", "presets"]
        + ["cache_compiled_programs"],
    ),
    "networks": (
        "Backbone and configuration",
        "The network without a task.",
        ["Backbone", "T5GemmaConfig", "StackConfig"],
    ),
    "text": (
        "Text and data",
        "Tokenizer, preprocessor, readers of files.",
        ["Tokenizer", "Seq2SeqLMPreprocessor", "read_pairs", "read_texts"]
        + ["PairFiles", "TextFiles"],
    ),
    "objectives": (
        "Objectives",
        "Training pairs from plain text.",
        ["objectives"],
    ),
    "training": (
        "Training",
        "Losses, distillation, metrics, curves, and whole runs.",
        ["finetune", "pretrain", "TokenCrossEntropy", "InfoNCE", "Distillation"]
        + ["TeacherScores", "write_teacher_scores", "score_texts", "plot_history"],
    ),
    "callbacks": ("Callbacks", "Callbacks of `fit`.", ["callbacks"]),
    "checkpoints": (
        "Adaptation and conversion",
        "Gemma 2 to T5Gemma, one format to another.",
        ["adapt_gemma2", "adapt_to_folder", "convert", "verify", "average_presets"],
    ),
    "devices": (
        "Devices and planning",
        "Several devices and processes, and what fits on them.",
        ["plan", "distribute", "connect"],
    ),
    "evaluation": (
        "Evaluation of encoders",
        "Fine-tuned on classification and retrieval, with several seeds.",
        ["evaluate_encoders"],
    ),
}

# Classes of what public functions return, which are not public names.
RETURNED = {
    "models": ["checkpoints.catalog.Preset"],
    "training": ["training.chunked_cross_entropy.TeacherTargets"],
    "checkpoints": ["conversion.compare.Comparison"],
    "devices": ["planning.costs.Plan", "distribution.distribute.MeshDistribution"],
}

# Methods of base classes that are shown with each public class that has them.
INHERITED = ["from_preset", "fit", "evaluate", "predict", "save_to_preset"]
INHERITED += ["enable_lora", "save_lora_weights", "load_lora_weights"]
INHERITED += ["default_lora_layer_names", "quantize", "export"]
INHERITED += ["attention_kernel", "generation_defaults"]


def public_names():
    """Names that `keras_t5gemma/__init__.py` exports."""
    return exported(PACKAGE / "__init__.py")


def exported(path):
    """Public classes and functions of a module, and names imported as themselves."""
    names = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names += [a.asname for a in node.names if a.asname == a.name]
        elif isinstance(node, ast.ClassDef | ast.FunctionDef) and node.col_offset == 0:
            names.append(node.name)
    return [name for name in names if not name.startswith("_")]


def members(name):
    """Public names of a module of the package that is itself a public name, else []."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            folder = ROOT / node.module.replace(".", "/")
            if (
                name in [a.name for a in node.names]
                and (folder / f"{name}.py").exists()
            ):
                return exported(folder / f"{name}.py")
    return []


def api_pages():
    """`{path: Markdown}` of the API reference."""
    rows = []
    pages = {}
    for page, (title, summary, names) in PAGES.items():
        text = [f"# {title}", "", summary, ""]
        listed = []
        for name in names:
            inner = members(name)
            if inner:
                text += [f"Module `keras_t5gemma.{name}`.", ""]
            for path in [f"{name}.{member}" for member in inner] or [name]:
                text += block(path)
                listed.append(f"[`{path}`][keras_t5gemma.{path}]")
        for path in RETURNED.get(page, []):
            text += block(path)
            listed.append(f"[`{path.rpartition('.')[2]}`][keras_t5gemma.{path}]")
        pages[f"api/{page}.md"] = "\n".join(text)
        rows.append(f"| [{title}]({page}.md) | {', '.join(listed)} |")
    index = ["# Python reference", "", "All public names: `import keras_t5gemma`.", ""]
    index += ["| page | names |", "|---|---|", *rows, ""]
    return {"api/index.md": "\n".join(index), **pages}


def block(path):
    """Lines that mkdocstrings replaces with the documentation of an object."""
    options = ["    options:", f"      inherited_members: {json.dumps(INHERITED)}"]
    return [f"::: keras_t5gemma.{path}", *options, ""]


def cli_page():
    """Markdown of the command line reference, from the options' dataclasses."""
    from keras_t5gemma.cli import main
    from keras_t5gemma.utils.options import field_docs

    text = [
        "# Command line",
        "",
        "`keras-t5gemma COMMAND --help` shows the same. `--backend`, before the "
        "command, chooses `jax`, `tensorflow` or `torch`.",
        "",
    ]
    for command, (kind, _) in main.COMMANDS.items():
        docs = field_docs(kind)
        hints = typing.get_type_hints(kind, include_extras=True)
        usage, rows = ["keras-t5gemma", command], []
        for field in dataclasses.fields(kind):
            hint = hints[field.name]
            is_required = field.default is dataclasses.MISSING
            if main.tyro.conf.Positional in getattr(hint, "__metadata__", ()):
                name = field.name.upper()
                usage.append(name if is_required else f"[{name}]")
            else:
                name = flag_of(field, hint)
                usage += [f"{name} ..."] if is_required else []
            parts = [f"`{name}`", values(hint), default_of(field)]
            rows += [" · ".join(filter(None, parts)), f":   {docs[field.name]}", ""]
        text += [f"## {command}", "", (kind.__doc__ or "").strip(), ""]
        usage += ["[OPTIONS]"] if rows else []
        text += ["```bash", " ".join(usage), "```", "", *rows]
    return "\n".join(text)


def flag_of(field, hint):
    """`--name`, or both forms of a switch."""
    flag = "--" + field.name.replace("_", "-")
    return f"{flag}, --no-{flag[2:]}" if hint is bool else flag


def default_of(field):
    """A default as Markdown."""
    if field.default is not dataclasses.MISSING:
        empty = field.default is None or field.default == ()
        shown = str(field.default).strip("()").rstrip(",")
        return "" if empty else f"default `{shown}`"
    return "required"


def values(hint):
    """What an option accepts, in words."""
    while hasattr(hint, "__metadata__"):
        hint = hint.__origin__
    arguments = [a for a in typing.get_args(hint) if a is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    origin = typing.get_origin(hint)
    if origin in (tuple, list) or getattr(origin, "__name__", "") == "Sequence":
        return f"{values(arguments[0])}, several"
    if arguments:  # A union.
        words = dict.fromkeys(values(argument) for argument in arguments)
        return " or ".join(word for word in words if word)
    names = {int: "number", float: "number", bool: "", str: "text", Path: "path"}
    return names.get(hint, "path" if "PathLike" in str(hint) else "")

"""Functions that run the sub-commands of `keras-t5gemma`."""

import dataclasses
import importlib
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_t5gemma.cli import options
from keras_t5gemma.evaluation.options import EvaluateOptions
from keras_t5gemma.planning.options import PlanOptions
from keras_t5gemma.recipes.options import FinetuneOptions, PretrainOptions
from keras_t5gemma.utils.checks import number, renamed, rows_of_batch
from keras_t5gemma.utils.files import read_text
from keras_t5gemma.utils.progress import to_terminal

if TYPE_CHECKING:
    from keras_t5gemma.checkpoints.presets import Source
    from keras_t5gemma.config import StackConfig, T5GemmaConfig

_MAX_CACHE_BYTES = 2**30
_BATCHES = 32  # Batches of `generate --lines` after which answers are printed.


def load_package() -> Any:
    """Import all of `keras_t5gemma`, which the command line deferred, and return it.

    Keras then finds every serializable class, as in a library user's process.
    """
    import keras  # noqa: F401

    import keras_t5gemma

    if not hasattr(keras_t5gemma, "Seq2SeqLM"):
        importlib.reload(keras_t5gemma)  # Keras is loaded: nothing is deferred now.
    return keras_t5gemma


def read_texts(o: options.Generate) -> list[str]:
    """Texts from the arguments, a file or, also for `-`, standard input.

    Raises:
        ValueError: for both arguments and a file, and for empty input.
    """
    if o.text and o.file:
        raise ValueError("pass TEXT or --file, not both.")
    if o.text and list(o.text) != ["-"]:
        return list(o.text)
    if o.file and str(o.file) != "-":
        content = read_text(o.file, "utf-8-sig")
    else:
        if sys.stdin.isatty():
            print("Type or paste a text, then Ctrl-D.", file=sys.stderr)
        content = sys.stdin.read()
    # Only line feeds separate lines; `splitlines` also cuts at U+2028 and form feeds.
    content = content.removeprefix("\ufeff")
    texts = content.removesuffix("\n").split("\n") if o.lines else [content]
    texts = [text.strip() for text in texts]
    if not any(texts):
        raise ValueError("the input is empty: pass a TEXT, --file, or a pipe.")
    return texts


def run_generate(o: options.Generate) -> None:
    """Print one answer per line, or several per text with --num-return-sequences."""
    texts = read_texts(o)
    if o.stream and len(texts) > 1:
        raise ValueError(f"--stream takes one text; got {len(texts)}.")
    rows_of_batch(o.batch_size, "batch_size")
    kt = load_package()
    _cache_programs(kt, o.compilation_cache)
    model = kt.Seq2SeqLM.from_preset(o.preset, dtype=o.dtype)
    if o.quantize is not None:
        model.quantize(o.quantize)
    model.compile(sampler=o.sampler)
    sampling = fields_of(o, options.Sampling)
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if o.draft is not None:
        with renamed(preset="draft"):
            sampling["draft"] = kt.Seq2SeqLM.from_preset(o.draft, dtype=o.dtype)
    if o.stream:
        for piece in model.stream(texts[0], o.max_length, **sampling):
            print(piece, end="", flush=True)
        print()
        return
    chunk = _BATCHES * o.batch_size  # An interrupted command has printed its chunks.
    for start in range(0, len(texts), chunk):
        answers = model.generate(
            texts[start : start + chunk],
            max_length=o.max_length,
            batch_size=o.batch_size,
            **sampling,
        )
        for answer in answers:
            for text in answer if isinstance(answer, list) else [answer]:
                print(" ".join(text.split()) if o.lines else text, flush=True)


def _cache_programs(kt, folder):
    """Keep compiled programs where `--compilation-cache` says."""
    if folder == "auto":
        import keras

        if keras.config.backend() != "jax":
            return
        import jax

        if jax.config.jax_compilation_cache_dir:  # The user's own choice.
            return
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base, "keras-t5gemma", "programs")
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:  # A home folder that is read-only.
            return
    if folder != "none":
        kt.cache_compiled_programs(folder, _MAX_CACHE_BYTES)


def fields_of(o: Any, kind: type) -> dict[str, Any]:
    """Values of the fields that an options object has from one of its base classes."""
    return {field.name: getattr(o, field.name) for field in dataclasses.fields(kind)}


def run_finetune(o: options.Finetune) -> None:
    """Fine-tune, with a hint when interrupted."""
    _run_resumable(load_package().finetune, fields_of(o, FinetuneOptions))


def run_pretrain(o: options.Pretrain) -> None:
    """Pretrain, with a hint when interrupted."""
    _run_resumable(load_package().pretrain, fields_of(o, PretrainOptions))


def run_evaluate(o: options.Evaluate) -> None:
    """Evaluate, with a hint when interrupted."""
    _run_resumable(load_package().evaluate_encoders, fields_of(o, EvaluateOptions))


def _run_resumable(function: Callable[..., Any], keywords: dict[str, Any]) -> None:
    try:
        function(**keywords)
    except KeyboardInterrupt:
        print("\nThe same command resumes this run.", file=sys.stderr)
        raise


def run_presets(o: options.Presets) -> None:
    """Print a table on a terminal, tab-separated lines in a pipe."""
    from keras_t5gemma.checkpoints.catalog import presets

    rows = [
        (
            row.name,
            f"{row.parameters:,}",
            row.objective,
            "yes" if row.tuned else "no",
            row.description,
            " ".join(row.sources),
        )
        for row in presets()
    ]
    header = ("name", "parameters", "objective", "tuned", "description", "sources")
    print_rows(rows, header)


def run_info(o: options.Info) -> None:
    """Print what a preset's configuration and file headers say."""
    from keras_t5gemma.checkpoints import catalog
    from keras_t5gemma.checkpoints.checkpoint import open_checkpoint

    rows, lineage, text_rows = [("preset", o.preset)], None, []
    config = catalog.published_config(o.preset)
    if config is None:
        opened = open_checkpoint(o.preset)
        config, lineage = opened.config, opened.lineage
        rows += [("format", opened.format), ("weights stored as", opened.stored_dtype)]
        if os.path.isdir(opened.location):
            files = [f for f in Path(opened.location).rglob("*") if f.is_file()]
            size = sum(f.stat().st_size for f in files)
            rows += [("folder", opened.location)]
            rows += [("size on disk", f"{size / 1e6:,.1f} MB")]
        text_rows = _describe_text(opened.source)
    else:
        row = next(r for r in catalog.presets() if r.name == o.preset)
        rows += [("description", row.description), ("sources", " ".join(row.sources))]
    rows += [("parameters", f"{config.count_params():,}")]
    rows += [(f"  {k}", f"{v:,}") for k, v in config.count_params_by_part().items()]
    rows += [
        ("vocabulary", f"{config.vocabulary_size:,}"),
        ("longest sequence", f"{config.max_positions:,} tokens"),
    ]
    for side in ("encoder", "decoder"):
        stack = getattr(config, side)
        rows += [(side, "none" if stack is None else _describe(stack))]
    rows += text_rows
    rows += _describe_memory(config)
    rows += [(f"lineage: {k}", v) for k, v in (lineage or {}).items() if v is not None]
    print_rows(rows)


def _describe_memory(config: "T5GemmaConfig") -> list[tuple[str, str]]:
    """Rows of the memory for one text of the full length, by data type."""
    from keras_t5gemma.planning.inference import CARD, inference_memory

    answer = min(1024, config.max_positions)
    found = inference_memory(config, config.max_positions, answer)
    sizes = [f"{name} {x.total / 1e9:,.2f} GB" for name, x in found.items()]
    fits = [name for name, x in found.items() if x.fits()]
    tokens = f"{config.max_positions:,} tokens read"
    if config.decoder is not None:
        tokens += f" and {answer:,} written"
    return [
        (f"memory estimated, {tokens}", ", ".join(sizes)),
        (f"fits a card of {CARD // 10**9} GB in", ", ".join(fits) or "none of them"),
    ]


def _describe_text(source: "Source") -> list[tuple[str, str]]:
    """Rows of the template, and of what is taken from generation_config.json."""
    from keras_t5gemma.checkpoints import generation_config
    from keras_t5gemma.tokenization import chat_template

    found = generation_config.read(source)
    template = chat_template.template_of(source)
    rows = [("template", "none" if template is None else repr(template))]
    rows += [(f"generate: {k}", str(v)) for k, v in found.defaults.items()]
    unused = "not implemented: generation_config.json has"
    return rows + [(f"generate: {k}", f"{unused} {v}") for k, v in found.unused.items()]


def _describe(stack: "StackConfig") -> str:
    return (
        f"{stack.num_layers} layers, width {stack.hidden_dim}, feed-forward "
        f"{stack.intermediate_dim}, {stack.num_query_heads} heads "
        f"({stack.num_key_value_heads} key/value) of {stack.head_dim}, window "
        f"{stack.sliding_window}"
    )


def run_adapt(o: options.Adapt) -> None:
    """Adapt, and suggest the next step."""
    load_package()
    from keras_t5gemma.conversion.adapt import adapt_to_folder

    keywords = fields_of(o, options.Adapt)
    with renamed(folder="output"):
        lineage, report = adapt_to_folder(folder=keywords.pop("output"), **keywords)
    print(
        f"{o.output}: encoder from {lineage['encoder']}, decoder from "
        f"{lineage['decoder']}."
    )
    for line in report:
        print(f"  {line}")
    if lineage["needs_warm_up"]:
        print(
            "The cross-attention is random: train it alone for the first steps (1,000 "
            "in arXiv 2504.06225), then everything; pretrain does."
        )
    else:
        print("The cross-attention is a copy: all weights are trained from the start.")
    preset = shlex.quote(str(o.output))
    print(
        f"Next:\n  keras-t5gemma pretrain --preset {preset} --train texts.txt "
        "--output RUN"
    )


def run_convert(o: options.Convert) -> None:
    """Convert, tensor by tensor."""
    load_package()
    from keras_t5gemma.conversion.convert import convert

    with renamed(folder="output"):
        convert(o.preset, o.output, to=o.to, dtype=o.dtype, overwrite=o.overwrite)
    print(f"{o.output}: {o.preset} as {o.to}.")


def run_verify(o: options.Verify) -> int:
    """Print the largest differences; status 1 beyond the tolerance."""
    load_package()
    from keras_t5gemma.conversion import compare

    if o.other is None:
        count = compare.check_checksums(o.preset)
        if not count:
            raise ValueError(
                f"{o.preset} has no checksums.json; pass a second checkpoint to "
                "compare it with."
            )
        print(f"{o.preset}: all {count} tensors match their checksums.")
        return 0
    number(o.tolerance, "tolerance", at_least=0)
    with renamed(a="preset", b="other"):
        found = compare.verify(o.preset, o.other, o.seed)
    rows = [("configuration differs", line) for line in found.configs]
    rows += [(f"only in {o.preset}", path) for path in found.only_a]
    rows += [(f"only in {o.other}", path) for path in found.only_b]
    differences = sorted(found.tensors.items(), key=lambda row: -row[1])
    unequal = [row for row in differences if row[1] != 0]  # Includes NaN.
    rows += [
        ("tensors compared", f"{len(differences):,}, {len(unequal):,} of them differ")
    ]
    for path, difference in unequal[:10]:
        other = "another shape, or NaN" if math.isnan(difference) else None
        rows.append((path, other or f"{difference:.3g}"))
    logits = f"not computed: {found.note}" if found.note else f"{found.logits:.3g}"
    rows += [("logits, max|difference|", logits)]
    same = found.within(o.tolerance)
    rows += [("verdict", f"{'same' if same else 'differ'} at {o.tolerance:g}")]
    print_rows(rows)
    return 0 if same else 1


def run_plan(o: options.Plan) -> int:
    """Print a table, or JSON; status 1 when no layout fits."""
    plan = load_package().plan(**fields_of(o, PlanOptions))
    from keras_t5gemma.planning import table

    if o.json:
        extra = {name: getattr(plan, name) for name in ("total", "fits", "received")}
        print(json.dumps(dataclasses.asdict(plan) | extra, indent=2))
    else:
        table.print_plan(o, plan)
    return 0 if plan.fits else 1


def print_rows(
    rows: Iterable[Sequence[Any]], header: Sequence[str] | None = None
) -> None:
    """Print a table on a terminal, tab-separated lines otherwise."""
    if not to_terminal():
        for row in rows:
            print("\t".join(map(str, row)))
        return
    import rich
    from rich.table import Table

    table = Table(*(header or ()), show_header=header is not None)
    for row in rows:
        table.add_row(*map(str, row))
    rich.print(table)

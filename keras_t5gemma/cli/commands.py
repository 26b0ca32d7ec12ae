"""What the sub-commands of `keras-t5gemma` do; `cli.py` has their options."""

import dataclasses
import inspect
import json
import os
import sys
from pathlib import Path

# Options of `Seq2SeqLM.generate` with the same names and meanings.
GENERATION_OPTIONS = (
    ("num_beams", int, "beams of a beam search"),
    ("length_penalty", float, "power of the length that beams are ranked by"),
    ("temperature", float, "sample; logits are divided by this"),
    ("top_k", int, "sample among so many tokens"),
    ("top_p", float, "sample among the tokens of this probability"),
    ("repetition_penalty", float, "above 1: fewer repetitions"),
    ("no_repeat_ngram_size", int, "no so many tokens in a row twice"),
    ("min_new_tokens", int, "least tokens of an answer"),
    ("num_return_sequences", int, "answers a text, a line each"),
    ("seed", int, "of sampling"),
    ("max_time", float, "seconds after which what there is, is returned"),
)


def read_texts(args):
    """The texts of a `generate` call, from arguments, a file or a pipe."""
    if args.text and args.file:
        raise ValueError("pass TEXT or --file, not both.")
    if args.text:
        return args.text
    if args.file:
        content = args.file.read_text(encoding="utf-8")
    else:
        if sys.stdin.isatty():
            print("Type or paste a text, then Ctrl-D.", file=sys.stderr)
        content = sys.stdin.read()
    texts = content.splitlines() if args.lines else [content]
    texts = [text.strip() for text in texts]
    if not any(texts):
        raise ValueError("the input is empty: pass a TEXT, --file, or a pipe.")
    return texts


def run_generate(args):
    """One answer a line, or several lines a text with --num-return-sequences."""
    texts = read_texts(args)
    if args.stream and len(texts) > 1:
        raise ValueError(f"--stream takes one text; got {len(texts)}.")
    import keras_t5gemma

    if args.compilation_cache:
        keras_t5gemma.cache_compiled_programs(args.compilation_cache)
    model = keras_t5gemma.Seq2SeqLM.from_preset(args.preset, dtype=args.dtype)
    if args.quantize:
        model.quantize(args.quantize)
    model.compile(sampler=args.sampler)
    options = {name: getattr(args, name) for name, _, _ in GENERATION_OPTIONS}
    options = {name: value for name, value in options.items() if value is not None}
    if args.stream:
        for piece in model.stream(texts[0], args.max_length, **options):
            print(piece, end="", flush=True)
        print()
        return
    chunk = 32 * args.batch_size  # Answers appear, and are kept, as they come.
    for start in range(0, len(texts), chunk):
        answers = model.generate(
            texts[start : start + chunk],
            max_length=args.max_length,
            batch_size=args.batch_size,
            **options,
        )
        for answer in answers:
            for text in answer if isinstance(answer, list) else [answer]:
                print(" ".join(text.split()) if args.lines else text, flush=True)


def run_training(function, args):
    """`finetune`, `pretrain` or `evaluate` with the options that were given."""
    names = inspect.signature(function).parameters
    try:
        function(**{name: getattr(args, name) for name in names})
    except KeyboardInterrupt:
        print("\nThe same command goes on from what is kept.", file=sys.stderr)
        raise


def run_presets(args):
    """A table on a terminal, tab-separated lines in a pipe."""
    from keras_t5gemma.checkpoints.presets import presets

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


def run_info(args):
    """What a preset is, from its configuration and its files' headers."""
    from keras_t5gemma.checkpoints import presets
    from keras_t5gemma.checkpoints.checkpoint import open_checkpoint

    rows, lineage = [("preset", args.preset)], None
    config = presets.published_config(args.preset)
    if config is None:
        opened = open_checkpoint(args.preset)
        config, lineage = opened.config, opened.lineage
        rows += [("format", opened.format), ("weights stored as", opened.stored_dtype)]
        if os.path.isdir(opened.location):
            files = [f for f in Path(opened.location).rglob("*") if f.is_file()]
            size = sum(f.stat().st_size for f in files)
            rows += [("folder", opened.location)]
            rows += [("size on disk", f"{size / 1e6:,.1f} MB")]
    else:
        row = next(r for r in presets.presets() if r.name == args.preset)
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
    rows += [(f"lineage: {k}", v) for k, v in (lineage or {}).items() if v is not None]
    print_rows(rows, None)


def _describe(stack):
    return (
        f"{stack.num_layers} layers, width {stack.hidden_dim}, feed-forward "
        f"{stack.intermediate_dim}, {stack.num_query_heads} heads "
        f"({stack.num_key_value_heads} key/value) of {stack.head_dim}, window "
        f"{stack.sliding_window}"
    )


def run_adapt(args):
    """Adapt, and say what to do next."""
    from keras_t5gemma.conversion.adapt import adapt_to_folder

    lineage, report = adapt_to_folder(
        args.encoder,
        args.decoder,
        folder=args.output,
        dtype=args.dtype,
        overwrite=args.overwrite,
        check=not args.no_check,
        cross_attention=args.cross_attention,
        cross_norms=args.cross_norms,
        initializer_std=args.initializer_std,
        seed=args.seed,
        dropout=args.dropout,
    )
    print(f"{args.output}: {lineage['encoder']} reads, {lineage['decoder']} writes.")
    for line in report:
        print(f"  {line}")
    if lineage["needs_warm_up"]:
        print(
            "Its cross-attention is random: that is trained alone for the first steps "
            "(the paper: 1,000), then everything."
        )
    else:
        print("Its cross-attention is a copy: all of it is trained from the start.")
    print(
        f"Next:\n  keras-t5gemma pretrain --preset {args.output} --train texts.txt "
        "--output RUN"
    )


def run_convert(args):
    """Convert, tensor by tensor."""
    from keras_t5gemma.conversion.convert import convert

    convert(
        args.preset,
        args.output,
        to=args.to,
        dtype=args.dtype,
        overwrite=args.overwrite,
    )
    print(f"{args.output}: {args.preset} for {args.to}.")


def run_verify(args):
    """Largest differences first; status 1 beyond the tolerance."""
    from keras_t5gemma.conversion import verify

    if args.other is None:
        count = verify.check_checksums(args.preset)
        if not count:
            raise ValueError(
                f"{args.preset} has no checksums.json; pass a second checkpoint to "
                "compare it with."
            )
        print(f"{args.preset}: all {count} tensors are what was written.")
        return 0
    found = verify.compare(args.preset, args.other, args.seed)
    rows = [("configuration differs", line) for line in found.configs]
    rows += [(f"only in {args.preset}", path) for path in found.only_a]
    rows += [(f"only in {args.other}", path) for path in found.only_b]
    differences = sorted(found.tensors.items(), key=lambda row: -row[1])
    unequal = [row for row in differences if row[1] != 0]  # NaN too.
    rows += [
        ("tensors compared", f"{len(differences):,}, {len(unequal):,} of them differ")
    ]
    rows += [(path, f"{difference:.3g}") for path, difference in unequal[:10]]
    logits = f"not computed: {found.note}" if found.note else f"{found.logits:.3g}"
    rows += [("logits, max|difference|", logits)]
    same = found.within(args.tolerance)
    rows += [("verdict", f"{'same' if same else 'differ'} at {args.tolerance:g}")]
    print_rows(rows, None)
    return 0 if same else 1


def run_plan(args):
    """A table, or JSON; status 1 when no layout fits."""
    from keras_t5gemma.planning import planner

    names = inspect.signature(planner.plan).parameters
    options = {name: getattr(args, name) for name in names}
    options["length"] = args.length * (2 if len(args.length) == 1 else 1)
    if args.mesh is not None:
        options["mesh"] = dict(zip(("data", "model"), args.mesh, strict=True))
    result = planner.plan(**options)
    if args.json:
        extra = {name: getattr(result, name) for name in ("total", "fits", "received")}
        print(json.dumps(dataclasses.asdict(result) | extra, indent=2))
    else:
        print_rows(planner.rows(result), None)
    return 0 if result.fits else 1


def print_rows(rows, header):
    """A rich table where somebody looks, tab-separated lines where not."""
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(map(str, row)))
        return
    import rich
    from rich.table import Table

    table = Table(*(header or ()), show_header=header is not None)
    for row in rows:
        table.add_row(*map(str, row))
    rich.print(table)

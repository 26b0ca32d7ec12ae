"""The `keras-t5gemma` command."""

import argparse
import dataclasses
import functools
import inspect
import json
import os
import sys
from pathlib import Path

from keras_t5gemma.environment import BACKENDS

DEFAULT_PRESET = "t5gemma_mini_synopsis"
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


def main(argv=None):
    """Run the command; returns its exit status."""
    args = make_parser().parse_args(argv)
    if args.backend and args.backend != _loaded_backend():
        # Importing the package has imported Keras: start again with the right one.
        os.environ["KERAS_BACKEND"] = args.backend
        argv = sys.argv[1:] if argv is None else argv
        os.execv(sys.executable, [sys.executable, "-m", __spec__.name, *argv])
    try:
        return args.run(args) or 0
    except BrokenPipeError:  # The reader, `head` say, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("keras-t5gemma: stopped.", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"keras-t5gemma: {error}", file=sys.stderr)
        return 1
    return 0


def _loaded_backend():
    import keras

    return keras.config.backend()


def make_parser():
    """The parser of all sub-commands."""
    parser = argparse.ArgumentParser(
        prog="keras-t5gemma", description="Encoder-decoder Gemma for Keras 3."
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        help="default: KERAS_BACKEND, else Keras's own choice",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="write an answer to each text")
    generate.add_argument("text", nargs="*", help="default: standard input")
    generate.add_argument("--file", type=Path, help="read the text from a file")
    generate.add_argument(
        "--lines", action="store_true", help="input holds one text a line"
    )
    generate.add_argument("--preset", default=DEFAULT_PRESET, help="name or folder")
    generate.add_argument("--max-length", type=int, help="most tokens of an answer")
    generate.add_argument("--batch-size", type=int, default=32)
    generate.add_argument(
        "--sampler", default="greedy", help="greedy (default), beam, top_k, top_p, ..."
    )
    for name, kind, meaning in GENERATION_OPTIONS:
        flag = "--" + name.replace("_", "-")
        generate.add_argument(flag, dest=name, type=kind, help=meaning)
    generate.add_argument(
        "--stream", action="store_true", help="show the answer as it is written"
    )
    generate.add_argument("--dtype", help="e.g. bfloat16; default: Keras's own")
    generate.add_argument("--quantize", help="int8 or int4 weights")
    generate.add_argument(
        "--compilation-cache", metavar="FOLDER", help="keep compiled programs there"
    )
    generate.set_defaults(run=run_generate)

    from keras_t5gemma.training.finetune import finetune
    from keras_t5gemma.training.pretrain import pretrain
    from keras_t5gemma.training.run_options import add_options

    for name, function, data, what in (
        ("pretrain", pretrain, "plain text", "continue the training of an adapted"),
        ("finetune", finetune, "text pairs", "train a"),
    ):
        training = commands.add_parser(
            name,
            help=f"{what} preset on {data} from files",
            description=f"{data.capitalize()} from files in, a preset out. A run that "
            "was stopped goes on when the same command is given again.",
        )
        add_options(training, function)
        training.set_defaults(run=functools.partial(run_training, function))

    from keras_t5gemma.evaluation.evaluate import evaluate_encoders

    evaluate = commands.add_parser(
        "evaluate",
        help="compare encoders on tasks: classes and retrieval, SuperGLUE's too",
        description="Train encoders for tasks, measure them on test rows, and write a "
        "table. A run that was stopped goes on when the same command is given again.",
    )
    add_options(evaluate, evaluate_encoders)
    evaluate.set_defaults(run=functools.partial(run_training, evaluate_encoders))

    listing = commands.add_parser("presets", help="list the named presets")
    listing.set_defaults(run=run_presets)

    info = commands.add_parser("info", help="describe a preset without its weights")
    info.add_argument("preset", nargs="?", default=DEFAULT_PRESET)
    info.set_defaults(run=run_info)

    adapt = commands.add_parser(
        "adapt", help="turn decoder-only Gemma 2 into a T5Gemma, file to file"
    )
    adapt.add_argument("encoder", help="Gemma 2: KerasHub's name, a folder, a handle")
    adapt.add_argument(
        "decoder", nargs="?", help="likewise; default: the encoder's, a balanced pair"
    )
    adapt.add_argument("--output", type=Path, required=True, help="folder to write")
    adapt.add_argument("--dtype", help="default: as the decoder's weights are stored")
    adapt.add_argument(
        "--cross-attention",
        default="auto",
        help="copy (of self-attention) or random; default: copy when balanced",
    )
    adapt.add_argument(
        "--cross-norms", default="auto", help="copy or zeros; default: as attention"
    )
    adapt.add_argument("--initializer-std", type=float, default=0.02)
    adapt.add_argument("--seed", type=int, default=0)
    adapt.add_argument("--dropout", type=float, default=0.0)
    adapt.add_argument("--overwrite", action="store_true")
    adapt.add_argument(
        "--no-check", action="store_true", help="skip the check of the result"
    )
    adapt.set_defaults(run=run_adapt)

    convert = commands.add_parser(
        "convert", help="write a checkpoint in another format, file to file"
    )
    convert.add_argument("preset", help="name, folder or handle, of any format")
    convert.add_argument("--output", type=Path, required=True, help="folder to write")
    convert.add_argument(
        "--to", default="keras_t5gemma", help="keras_t5gemma (default) or transformers"
    )
    convert.add_argument("--dtype", help="default: as the weights are stored")
    convert.add_argument("--overwrite", action="store_true")
    convert.set_defaults(run=run_convert)

    verify = commands.add_parser(
        "verify",
        help="compare two checkpoints, or one with its checksums; exit status 1 "
        "when they differ",
    )
    verify.add_argument("preset", help="name, folder or handle, of any format")
    verify.add_argument("other", nargs="?", help="likewise; default: the checksums")
    verify.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        help="largest difference of any tensor and of the logits",
    )
    verify.add_argument("--seed", type=int, default=0, help="of the random inputs")
    verify.set_defaults(run=run_verify)

    plan = commands.add_parser(
        "plan", help="bytes a device for a training, and the layout that fits"
    )
    plan.add_argument(
        "--preset", required=True, help="name, folder, or a pair: t5gemma_9b_9b"
    )
    plan.add_argument("--devices", type=int, required=True)
    plan.add_argument("--memory", required=True, help="of each: 80GB, 80GiB, bytes")
    plan.add_argument("--batch", type=int, required=True, help="of all devices")
    plan.add_argument(
        "--length",
        type=int,
        nargs="+",
        required=True,
        metavar="TOKENS",
        help="of encoder and decoder, or one number for both",
    )
    plan.add_argument("--optimizer", default="adamw", help="default: adamw")
    plan.add_argument("--dtype", default="mixed_bfloat16")
    plan.add_argument("--no-rematerialize", dest="rematerialize", action="store_false")
    plan.add_argument("--lora-rank", type=int)
    plan.add_argument("--quantize", help="int8 or int4, with --lora-rank")
    plan.add_argument("--strategy", help="data, fsdp or tensor; default: the best")
    plan.add_argument(
        "--mesh", type=int, nargs=2, metavar=("DATA", "MODEL"), help="default: the best"
    )
    plan.add_argument("--json", action="store_true", help="numbers in bytes, as JSON")
    plan.set_defaults(run=run_plan)
    return parser


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
    from keras_t5gemma.checkpoints.adapt import adapt_to_folder

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
    from keras_t5gemma.checkpoints.convert import convert

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
    from keras_t5gemma.checkpoints import verify

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
    from keras_t5gemma.distribution import plan

    names = inspect.signature(plan.plan).parameters
    options = {name: getattr(args, name) for name in names}
    options["length"] = args.length * (2 if len(args.length) == 1 else 1)
    if args.mesh is not None:
        options["mesh"] = dict(zip(("data", "model"), args.mesh, strict=True))
    result = plan.plan(**options)
    if args.json:
        extra = {name: getattr(result, name) for name in ("total", "fits", "received")}
        print(json.dumps(dataclasses.asdict(result) | extra, indent=2))
    else:
        print_rows(plan.rows(result), None)
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


if __name__ == "__main__":
    sys.exit(main())

"""The `keras-t5gemma` command."""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

DEFAULT_PRESET = "t5gemma_mini_synopsis"
BACKENDS = {"jax": "jax", "torch": "torch", "tensorflow": "tensorflow"}


def main(argv=None):
    """Run the command; returns its exit status."""
    parser = make_parser()
    args = parser.parse_args(argv)
    choose_backend(args.backend)
    if argv is None and _loaded_backend() != os.environ["KERAS_BACKEND"]:
        # Importing the package has imported Keras: start again with the right one.
        os.execv(sys.executable, [sys.executable, "-m", __spec__.name, *sys.argv[1:]])
    try:
        args.run(args)
    except BrokenPipeError:  # The reader, `head` say, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
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
        help="Keras backend; default: KERAS_BACKEND, or the first one installed",
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
    generate.add_argument("--dtype", help="e.g. bfloat16; default: Keras's own")
    generate.set_defaults(run=run_generate)

    listing = commands.add_parser("presets", help="list the named presets")
    listing.set_defaults(run=run_presets)

    info = commands.add_parser("info", help="describe a preset without its weights")
    info.add_argument("preset", nargs="?", default=DEFAULT_PRESET)
    info.set_defaults(run=run_info)
    return parser


def choose_backend(wanted):
    """Set KERAS_BACKEND before Keras is imported, unless the user has."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if wanted is None and "KERAS_BACKEND" not in os.environ:
        installed = [b for b, m in BACKENDS.items() if importlib.util.find_spec(m)]
        if not installed:
            raise SystemExit(
                "keras-t5gemma: no backend is installed; install one of "
                "'keras-t5gemma[jax]', '[torch]', '[tensorflow]'."
            )
        wanted = installed[0]
    if wanted is not None:
        os.environ["KERAS_BACKEND"] = wanted


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
    """One answer a line; progress on a terminal when there are many."""
    texts = read_texts(args)
    import rich.progress

    import keras_t5gemma

    model = keras_t5gemma.Seq2SeqLM.from_preset(args.preset, dtype=args.dtype)
    model.compile(sampler=args.sampler)
    starts = range(0, len(texts), args.batch_size)
    if len(starts) > 1 and sys.stderr.isatty():
        console = rich.console.Console(stderr=True)
        starts = rich.progress.track(starts, "Generating", console=console)
    for start in starts:
        answers = model.generate(
            texts[start : start + args.batch_size],
            max_length=args.max_length,
            batch_size=args.batch_size,
        )
        for answer in answers:
            print(" ".join(answer.split()) if args.lines else answer, flush=True)


def run_presets(args):
    """A table on a terminal, tab-separated lines in a pipe."""
    from keras_t5gemma.checkpoints.presets import presets

    rows = [
        (row.name, f"{row.parameters:,}", row.description, row.source)
        for row in presets()
    ]
    header = ("name", "parameters", "description", "source")
    print_rows(rows, header)


def run_info(args):
    """What a preset is, from its configuration and file sizes."""
    import json

    from keras_t5gemma.checkpoints import huggingface, presets
    from keras_t5gemma.config import T5GemmaConfig

    location, kind = presets.resolve(args.preset)
    config = json.loads(
        Path(presets.get_file(location, "config.json")).read_text(encoding="utf-8")
    )
    if kind == presets.HUGGING_FACE:
        dtype = config.get("dtype") or config.get("torch_dtype")
        config = huggingface.read_config(config, location)
    else:
        dtype = config["config"]["dtype"]["config"].get("name", "several")
        config = T5GemmaConfig.from_dict(config["config"]["config"])
    embedding = config.vocabulary_size
    rows = [("preset", args.preset), ("format", kind), ("weights stored as", dtype)]
    if os.path.isdir(location):
        size = sum(f.stat().st_size for f in Path(location).rglob("*") if f.is_file())
        rows += [("folder", location), ("size on disk", f"{size / 1e6:,.1f} MB")]
    rows += [
        ("parameters", f"{config.count_params():,}"),
        ("vocabulary", f"{config.vocabulary_size:,}"),
        ("longest sequence", f"{config.max_positions:,} tokens"),
    ]
    for side in ("encoder", "decoder"):
        stack = getattr(config, side)
        rows += [
            (
                side,
                f"{stack.num_layers} layers, width {stack.hidden_dim}, feed-forward "
                f"{stack.intermediate_dim}, {stack.num_query_heads} heads "
                f"({stack.num_key_value_heads} key/value) of {stack.head_dim}, window "
                f"{stack.sliding_window}",
            ),
            (f"{side} blocks", f"{stack.count_params():,} parameters"),
            (f"{side} embedding", f"{embedding * stack.hidden_dim:,} parameters"),
        ]
    print_rows(rows, None)


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

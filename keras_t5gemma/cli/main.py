"""The `keras-t5gemma` command."""

import argparse
import functools
import os
import sys
from pathlib import Path

from keras_t5gemma.cli import commands
from keras_t5gemma.environment import BACKENDS

DEFAULT_PRESET = "t5gemma_mini_synopsis"


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
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = subparsers.add_parser("generate", help="write an answer to each text")
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
    for name, kind, meaning in commands.GENERATION_OPTIONS:
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
    generate.set_defaults(run=commands.run_generate)

    from keras_t5gemma.recipes.finetune import finetune
    from keras_t5gemma.recipes.options import add_options
    from keras_t5gemma.recipes.pretrain import pretrain

    for name, function, data, what in (
        ("pretrain", pretrain, "plain text", "continue the training of an adapted"),
        ("finetune", finetune, "text pairs", "train a"),
    ):
        training = subparsers.add_parser(
            name,
            help=f"{what} preset on {data} from files",
            description=f"{data.capitalize()} from files in, a preset out. A run that "
            "was stopped goes on when the same command is given again.",
        )
        add_options(training, function)
        training.set_defaults(run=functools.partial(commands.run_training, function))

    from keras_t5gemma.evaluation.harness import evaluate_encoders

    evaluate = subparsers.add_parser(
        "evaluate",
        help="compare encoders on tasks: classes and retrieval, SuperGLUE's too",
        description="Train encoders for tasks, measure them on test rows, and write a "
        "table. A run that was stopped goes on when the same command is given again.",
    )
    add_options(evaluate, evaluate_encoders)
    evaluate.set_defaults(
        run=functools.partial(commands.run_training, evaluate_encoders)
    )

    listing = subparsers.add_parser("presets", help="list the named presets")
    listing.set_defaults(run=commands.run_presets)

    info = subparsers.add_parser("info", help="describe a preset without its weights")
    info.add_argument("preset", nargs="?", default=DEFAULT_PRESET)
    info.set_defaults(run=commands.run_info)

    adapt = subparsers.add_parser(
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
    adapt.set_defaults(run=commands.run_adapt)

    convert = subparsers.add_parser(
        "convert", help="write a checkpoint in another format, file to file"
    )
    convert.add_argument("preset", help="name, folder or handle, of any format")
    convert.add_argument("--output", type=Path, required=True, help="folder to write")
    convert.add_argument(
        "--to", default="keras_t5gemma", help="keras_t5gemma (default) or transformers"
    )
    convert.add_argument("--dtype", help="default: as the weights are stored")
    convert.add_argument("--overwrite", action="store_true")
    convert.set_defaults(run=commands.run_convert)

    verify = subparsers.add_parser(
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
    verify.set_defaults(run=commands.run_verify)

    plan = subparsers.add_parser(
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
    plan.set_defaults(run=commands.run_plan)
    return parser


if __name__ == "__main__":
    sys.exit(main())

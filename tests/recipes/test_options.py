"""Options of `finetune`: the function, the command, its help, older run directories."""

import inspect
import json
import re

import pytest
import yaml
from helpers import ROOT

from keras_t5gemma.cli import main
from keras_t5gemma.recipes import run_directory
from keras_t5gemma.recipes.finetune import finetune
from keras_t5gemma.recipes.options import FinetuneOptions
from keras_t5gemma.utils.options import field_docs

pytestmark = pytest.mark.one_backend
# Default options in the config.json that version 0.1.0 wrote.
OPTIONS_0_1 = ROOT / "tests" / "fixtures" / "finetune_options_0_1.json"


def test_the_command_has_the_options_of_the_function():
    argv = ["finetune", "--preset", "p", "--train", "t", "--output", "o"]
    args = vars(main.parse(argv).command)
    for name, parameter in inspect.signature(finetune).parameters.items():
        value = args.pop(name)
        if parameter.default is not parameter.empty:
            assert value == parameter.default, name
    assert set(args) == {"config"}
    more = "--lora-rank 4 --lora-parts encoder mlp --save-freq 50 --rematerialize"
    args = main.parse([*argv, *more.split(), "--seed", "3"]).command
    assert (args.lora_rank, args.lora_parts) == (4, ("encoder", "mlp"))
    assert (args.save_freq, args.rematerialize, args.seed) == (50, True, 3)


def test_help_says_what_every_option_is(capsys):
    with pytest.raises(SystemExit):
        main.main(["finetune", "--help"])
    text = " ".join(re.findall(r"[^\s│|]+", capsys.readouterr().out))
    assert (
        "Keras optimizer; Adafactor needs the least memory. (default: adafactor)"
        in text
    )
    docs = field_docs(FinetuneOptions)
    for name, parameter in inspect.signature(finetune).parameters.items():
        assert f"--{name.replace('_', '-')}" in text and docs[name] in text
        argument = f"{name}: {docs[name]}"
        assert argument in " ".join(finetune.__doc__.split()), parameter
    assert finetune.__doc__.startswith("Fine-tune a preset")


def test_a_run_directory_of_version_0_1_resumes(tmp_path):
    """Its config.json has all options; there was no run.yaml."""
    folder = run_directory.RunDirectory(tmp_path)
    config = {"keras_t5gemma": "0.1.0", "backend": "jax", "data": {}}
    options = json.loads(OPTIONS_0_1.read_text())
    folder.config.write_text(json.dumps(config | {"options": options}))
    folder.log.write_text("epoch,loss\n0,1.0\n")
    defaults = FinetuneOptions(preset="base", train="train.jsonl", output="run")
    new = config | {"options": run_directory.as_json(vars(defaults))}
    assert not folder.must_be_cleared(new, False)
    folder.begin("finetune", new, False)
    assert yaml.safe_load(folder.options.read_text())["epochs"] == 3

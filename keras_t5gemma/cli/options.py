"""Options of the sub-commands; those of the recipes come from their own modules.

The docstring of a class describes its command, the docstring of a field its option.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from keras_t5gemma.evaluation.options import EvaluateOptions
from keras_t5gemma.planning.options import PlanOptions
from keras_t5gemma.recipes.options import FinetuneOptions, PretrainOptions

DEFAULT_PRESET = "t5gemma_mini_synopsis"


@dataclasses.dataclass
class Sampling:
    """Options of `Seq2SeqLM.generate` with the same names and meanings."""

    num_beams: int | None = None
    """Number of beams of a beam search."""
    length_penalty: float | None = None
    """Beam scores are divided by length ** this; 0 favors short answers."""
    temperature: float | None = None
    """Turn sampling on, and divide logits by this."""
    top_k: int | None = None
    """Turn sampling on, among the k likeliest tokens."""
    top_p: float | None = None
    """Turn sampling on, among the fewest tokens whose total probability is this."""
    repetition_penalty: float | None = None
    """Above 1: make repeated tokens less likely."""
    no_repeat_ngram_size: int | None = None
    """Never generate an n-gram of this size twice."""
    min_new_tokens: int | None = None
    """Minimum number of tokens of an answer."""
    num_return_sequences: int | None = None
    """Number of answers per text, one per line."""
    seed: int | None = None
    """Seed of the sampling."""
    max_time: float | None = None
    """Seconds after which unfinished answers are returned as they are."""
    speculate: str | None = None
    """source: verify several tokens a pass, copied from the source or the answer. The
    same answers, in less time where they repeat what was read."""


@dataclasses.dataclass
class Generate(Sampling):
    """Generate an answer to each text."""

    text: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts; without any, --file or standard input is read, which is also `-`."""
    file: Path | None = None
    """File to read the text from."""
    lines: bool = False
    """The input has one text per line; print one answer per line."""
    preset: str = DEFAULT_PRESET
    """Name, folder or handle."""
    max_length: int | None = None
    """Maximum number of decoder tokens, including the start token; default: the
    preset's decoder length."""
    batch_size: int = 32
    """Texts that are generated together."""
    sampler: str = "auto"
    """KerasHub sampler: greedy, beam, top_k, top_p, ...; auto is what the checkpoint's
    generation_config.json says, or greedy. --num-beams, --temperature, --top-k and
    --top-p override it."""
    stream: bool = False
    """Print the answer while it is generated."""
    dtype: str | None = None
    """Data type of the model, e.g. bfloat16; None is Keras's default."""
    quantize: Literal["int8", "int4"] | None = None
    """Quantize weights to int8 or int4."""
    draft: str | None = None
    """Name, folder or handle of a smaller preset of the same vocabulary, which proposes
    tokens that the model verifies: the same answers, in less time."""
    compilation_cache: str = "auto"
    """Folder that keeps compiled programs for the next start, on JAX, up to 1 GiB: auto
    is keras-t5gemma in the user's cache folder, none keeps nothing."""


@dataclasses.dataclass
class ConfigFile:
    """Options from a file."""

    config: str | None = None
    """YAML file of options, e.g. the run.yaml of an earlier run; options on the command
    line override it."""


@dataclasses.dataclass
class Pretrain(ConfigFile, PretrainOptions):
    """Continue the pretraining of an adapted preset on plain text."""


@dataclasses.dataclass
class Finetune(ConfigFile, FinetuneOptions):
    """Fine-tune a preset on text pairs."""


@dataclasses.dataclass
class Evaluate(ConfigFile, EvaluateOptions):
    """Compare encoders, fine-tuned on classification and retrieval tasks."""

    learning_rates: tuple[float, ...] = (1e-4,)
    """Learning rates to choose among."""


@dataclasses.dataclass
class Presets:
    """List the named presets."""


@dataclasses.dataclass
class Info:
    """Describe a preset without loading its weights."""

    preset: tyro.conf.Positional[str] = DEFAULT_PRESET
    """Name, folder or handle."""


@dataclasses.dataclass
class Adapt:
    """Turn decoder-only Gemma 2 checkpoints into a T5Gemma preset, file to file."""

    encoder: tyro.conf.Positional[str]
    """Gemma 2 for the encoder: KerasHub name, folder or handle."""
    output: Path
    """Folder to write."""
    decoder: tyro.conf.Positional[str | None] = None
    """Gemma 2 for the decoder; None takes the encoder's, for a balanced pair."""
    dtype: str | None = None
    """Data type of the weights; None is that of the decoder's checkpoint."""
    cross_attention: str = "auto"
    """copy (of self-attention) or random; auto copies in a balanced pair."""
    cross_norms: str = "auto"
    """copy or zeros; auto is copy where the cross-attention is copied."""
    initializer_std: float = 0.02
    """Standard deviation of random weights."""
    seed: int = 0
    """Seed of random weights."""
    dropout: float = 0.0
    """Dropout rate of the model."""
    overwrite: bool = False
    """Replace an existing folder."""
    check: bool = True
    """Compare the result with its sources on random inputs."""


@dataclasses.dataclass
class Convert:
    """Write a checkpoint in another format, file to file."""

    preset: tyro.conf.Positional[str]
    """Name, folder or handle, in any format."""
    output: Path
    """Folder to write."""
    to: str = "keras_t5gemma"
    """keras_t5gemma or transformers."""
    dtype: str | None = None
    """float32, bfloat16, float16, int8 or int4; None keeps the stored one."""
    overwrite: bool = False
    """Replace an existing folder."""


@dataclasses.dataclass
class Verify:
    """Compare two checkpoints, or one with its checksums; status 1 if they differ."""

    preset: tyro.conf.Positional[str]
    """Name, folder or handle, in any format."""
    other: tyro.conf.Positional[str | None] = None
    """Checkpoint to compare with; None checks the checksums of the first."""
    tolerance: float = 1e-5
    """Largest accepted difference of a tensor and of the logits."""
    seed: int = 0
    """Seed of the random inputs."""


@dataclasses.dataclass
class Plan(PlanOptions):
    """Estimate memory per device, and choose a layout; status 1 if none fits."""

    preset: str
    """Name of a preset, of a pair of sizes, e.g. t5gemma_9b_9b, folder or handle."""
    memory: str
    """Memory of each device: bytes, or with a unit, e.g. 80GB or 80GiB."""
    optimizer: Literal["adafactor", "adamw", "lion", "muon"] = "adamw"
    """Optimizer, which clips gradients by their global norm as finetune and pretrain
    do."""
    mesh: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="DATA MODEL")] = None
    """Devices along the mesh axes data and model; None compares all meshes."""
    json: bool = False
    """Print numbers in bytes, as JSON."""

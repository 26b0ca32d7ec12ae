"""Options of `plan`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from keras_t5gemma.config import T5GemmaConfig
from keras_t5gemma.utils.checks import flag, whole_number
from keras_t5gemma.utils.options import PathOrName, check_choices

MAX_DEVICES = 2**20


@dataclasses.dataclass
class PlanOptions:
    """Options of `plan`: a model, its training and the devices."""

    preset: PathOrName | T5GemmaConfig
    """Name of a preset, of a pair of sizes, e.g. t5gemma_9b_9b, folder or handle; in
    Python also a `T5GemmaConfig`."""
    devices: int
    """Number of devices."""
    memory: int | str
    """Memory of each device: bytes, or with a unit, e.g. 80GB or 80GiB."""
    batch: int
    """Pairs per step, on all devices together."""
    length: int | tuple[int, int]
    """Tokens of encoder and decoder, or one number for both."""
    _: dataclasses.KW_ONLY
    optimizer: Literal["adafactor", "adamw", "lion", "muon"] | Any = "adamw"
    """Optimizer, which clips gradients by their global norm as `finetune` and
    `pretrain` do; in Python also a Keras optimizer."""
    dtype: Literal["mixed_bfloat16", "bfloat16", "float32"] = "mixed_bfloat16"
    """Data type policy of the model."""
    rematerialize: bool = True
    """Keep only the input of each block for the backward pass, and recompute the rest;
    see `Seq2SeqLM.compile`."""
    lora_rank: int | None = None
    """Rank of LoRA adapters on queries and values; None trains all weights."""
    quantize: Literal["int8", "int4"] | None = None
    """Quantize the weights below the adapters; needs `lora_rank`."""
    strategy: Literal["data", "fsdp", "tensor"] | None = None
    """How the model is split; None compares all strategies."""
    mesh: Mapping[str, int] | tuple[int, int] | None = None
    """Devices along the mesh axes data and model, in Python also as a dict; None
    compares all meshes."""

    def check(self) -> None:
        """Check choices and ranges.

        Raises:
            ValueError: naming the option, its value and what is accepted.
        """
        check_choices(self)
        for name in ("devices", "batch", "lora_rank"):
            if name != "lora_rank" or self.lora_rank is not None:
                high = MAX_DEVICES if name == "devices" else None
                whole_number(getattr(self, name), name, 1, high)
        flag(self.rematerialize, "rematerialize")
        if self.quantize and not self.lora_rank:
            raise ValueError(
                f"`quantize` {self.quantize!r} needs `lora_rank`: quantized weights "
                "are not trained."
            )

"""Peers of `generate.py`: loading and greedy generation with each library.

A loader takes `(mode, precision, batch, args)`. It returns the model and a function of
`(ids, mask, new_tokens)`, int arrays `(batch, length)`, that returns the generated ids.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

OURS = "keras_t5gemma"
PEERS = (  # Those to be compared come first, to be in one group.
    "keras_hub jax",
    "keras_hub torch",
    "keras_t5gemma tensorflow",
    "keras_t5gemma torch",
    "keras_t5gemma torch compiled",
    "keras_t5gemma jax",
    "transformers eager",
    "transformers compiled",
    "ctranslate2 float32",
    "keras_hub tensorflow",
    "keras_t5gemma torch int8",
    "keras_t5gemma jax int8",
    "keras_t5gemma tensorflow int8",
    "keras_t5gemma torch bfloat16",
    "ctranslate2 int8",
)
REQUEST_PEERS = tuple(p for p in PEERS if p.startswith("keras") and p.count(" ") == 1)
GPU_PEERS = (
    "keras_t5gemma jax bfloat16",
    "keras_t5gemma torch bfloat16",
    "keras_t5gemma tensorflow bfloat16",
    "transformers eager bfloat16",
)
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def parse(peer):
    """Split a peer's name into library, backend or mode, and precision."""
    library, *rest = peer.split()
    precision = rest.pop() if rest[-1] in BYTES else "float32"
    return library, " ".join(rest), precision


def load_keras_t5gemma(backend, precision, batch, args):
    import keras_t5gemma as kt

    dtype = "bfloat16" if precision == "bfloat16" else "float32"
    if args.folder:
        backbone = kt.Backbone.from_preset(args.folder, dtype=dtype)
    else:
        backbone = kt.Backbone(kt.T5GemmaConfig.pair("2b", "2b"), dtype=dtype)
    model = kt.Seq2SeqLM(backbone)
    if backend == "torch compiled":
        model.compile(jit_compile=True)
    if precision == "int8":
        model.quantize("int8")

    def generate(ids, mask, new_tokens):
        inputs = {"encoder_token_ids": ids, "encoder_padding_mask": mask}
        options = {"stop_token_ids": None, "batch_size": batch}
        out = model.generate(inputs, max_length=1 + new_tokens, **options)
        return out["decoder_token_ids"][:, 1:]

    return model, generate


def load_keras_hub(backend, precision, batch, args):
    from keras_hub.models import T5GemmaBackbone, T5GemmaSeq2SeqLM

    backbone = T5GemmaBackbone.from_preset(str(args.folder), dtype=precision)
    model = T5GemmaSeq2SeqLM(backbone, preprocessor=None)
    model.compile(sampler="greedy")

    def generate(ids, mask, new_tokens):
        prompt = np.zeros((len(ids), 1 + new_tokens), "int32")
        prompt[:, 0] = 2
        inputs = {
            "encoder_token_ids": ids,
            "encoder_padding_mask": mask,
            "decoder_token_ids": prompt,
            "decoder_padding_mask": prompt != 0,
        }
        out = model.generate(inputs, stop_token_ids=None)
        return out["decoder_token_ids"][:, 1:]

    return model, generate


def load_transformers(mode, precision, batch, args):
    import torch
    import transformers

    kind = transformers.T5GemmaForConditionalGeneration
    device = "cuda" if args.device == "gpu" else "cpu"
    dtype = getattr(torch, precision)
    if args.folder:
        model = kind.from_pretrained(args.folder, dtype=dtype)
    else:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model = kind(transformers.T5GemmaConfig()).eval()  # 2B-2B by default.
    model.generation_config.eos_token_id = None  # No stop id.
    options = {"do_sample": False, "decoder_start_token_id": 2, "pad_token_id": 0}
    if mode == "compiled":
        options["cache_implementation"] = "static"
        options["compile_config"] = transformers.CompileConfig()
        options["compile_config"]._compile_all_devices = True  # Else it skips CPUs.

    def generate(ids, mask, new_tokens):
        ids, mask = (torch.from_numpy(array).to(device) for array in (ids, mask))
        options["max_new_tokens"] = new_tokens
        out = model.generate(ids, attention_mask=mask, **options)
        return out[:, 1:].cpu().numpy()

    return model, generate


def load_ctranslate2(mode, precision, batch, args):
    import ctranslate2

    model = ctranslate2.Translator(
        str(converted_folder(args.folder, precision)),
        compute_type=precision,
        inter_threads=1,
        intra_threads=args.threads,
    )

    def generate(ids, mask, new_tokens):
        rows = [row[keep].tolist() for row, keep in zip(ids, mask != 0, strict=True)]
        results = model.translate_batch(
            [[f"<{i}>" for i in row] for row in rows],
            beam_size=1,
            max_input_length=0,
            min_decoding_length=new_tokens,
            max_decoding_length=new_tokens,
        )
        return np.array([[int(t[1:-1]) for t in r.hypotheses[0]] for r in results])

    return model, generate


LOADERS = {
    OURS: load_keras_t5gemma,
    "keras_hub": load_keras_hub,
    "transformers": load_transformers,
    "ctranslate2": load_ctranslate2,
}


def converted_folder(folder, precision):
    return Path(f"{folder}-ctranslate2-{precision}")


def convert(folder, precision):
    """Convert a folder for CTranslate2, with ids as vocabulary, e.g. `<17>`."""
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        def load_tokenizer(self, *args, **kwargs):
            vocabulary = {f"<{i}>": i for i in range(256_000)}
            special = {"bos_token": "<2>", "eos_token": "<1>", "unk_token": "<3>"}
            return SimpleNamespace(get_vocab=lambda: vocabulary, **special)

    target = str(converted_folder(folder, precision))
    Converter(str(folder)).convert(target, quantization=precision)

"""Adapt decoder-only Gemma 2 to T5Gemma (arXiv 2504.06225, section 3.2)."""

import math
from pathlib import Path
from typing import Any

import keras

from keras_t5gemma.checkpoints import atomic, keras_format, weight_maps
from keras_t5gemma.checkpoints.atomic import atomic_folder
from keras_t5gemma.checkpoints.lazy_tensors import (
    FreshTensor,
    LazyTensor,
    nbytes,
    parse_dtype,
)
from keras_t5gemma.config import T5GemmaConfig
from keras_t5gemma.conversion import adaptation_checks
from keras_t5gemma.conversion.gemma2_reader import Gemma2, open_gemma2
from keras_t5gemma.environment import VERSION
from keras_t5gemma.modeling import weight_loading
from keras_t5gemma.modeling.backbone import Backbone
from keras_t5gemma.tokenization.preprocessor import Seq2SeqLMPreprocessor
from keras_t5gemma.tokenization.tokenizer import Tokenizer
from keras_t5gemma.utils.checks import number, one_of, renamed, whole_number
from keras_t5gemma.utils.progress import progress_bar
from keras_t5gemma.utils.sizes import parse_shard_size

# (path in the T5Gemma, source, path in the source), in the order of docs/facts.md,
# section 3. A Gemma 2 has all variables of a tower but those of cross-attention.
_TOWER = tuple(path for path, _, _ in weight_maps.GEMMA2_HUGGING_FACE)
WHOLE_ENCODER = tuple(("encoder/" + p, "encoder", p) for p in _TOWER)  # Row 1.
DECODER = tuple(("decoder/" + p, "decoder", p) for p in _TOWER)  # Row 2.
# Row 3, balanced: "copied from the same layer's self-attention".
CROSS_ATTENTION = tuple(
    (
        f"decoder/block_{{i}}/cross_attention/{name}/kernel",
        "decoder",
        f"block_{{i}}/self_attention/{name}/kernel",
    )
    for name in ("query", "key", "value", "output")
)
# Not published; the paper initializes each layer from the most similar weight.
CROSS_NORMS = tuple(
    (
        f"decoder/block_{{i}}/{place}_cross_norm/scale",
        "decoder",
        f"block_{{i}}/{place}_self_norm/scale",
    )
    for place in ("pre", "post")
)


def adapt_gemma2(
    encoder: Any,
    decoder: Any = None,
    dtype: str | keras.DTypePolicy | None = None,
    **options: Any,
) -> Backbone:
    """Adapt decoder-only Gemma 2 models to an encoder-decoder T5Gemma.

    The encoder is a Gemma 2 with bidirectional attention; the decoder is a Gemma 2 with
    cross-attention added to every layer (arXiv 2504.06225, section 3.2). The result
    needs training before it is useful: balanced pairs continue from copied
    cross-attention, unbalanced ones first train cross-attention alone (the paper:
    1,000 steps), as `backbone.lineage["needs_warm_up"]` says.

    Args:
        encoder: a Gemma 2: a KerasHub preset name (`"gemma2_9b_en"`), a folder in
            KerasHub's or transformers' format, an `hf://` or `kaggle://` handle, or a
            live `keras_hub.models.GemmaBackbone` or `GemmaCausalLM`.
        decoder: a Gemma 2 likewise; `None` takes the encoder's.
        dtype: dtype policy of the result, or its name; `None` is Keras's.
        **options: see `plan_adaptation`: `cross_attention`, `cross_norms`,
            `initializer_std`, `seed`, `dropout`.

    Returns:
        A `Backbone`, with the sources in its `lineage`.

    Raises:
        ValueError: if a source is not a Gemma 2, the vocabularies differ, or tensors
            do not fit, naming them.
        OSError: when a download fails, with instructions.
    """
    config, tensors, lineage, _ = plan_adaptation(encoder, decoder, **options)
    return weight_loading.fill(Backbone, config, tensors, lineage=lineage, dtype=dtype)


def plan_adaptation(
    encoder: Any,
    decoder: Any = None,
    cross_attention: str = "auto",
    cross_norms: str = "auto",
    initializer_std: float = 0.02,
    seed: int = 0,
    dropout: float = 0.0,
) -> tuple[T5GemmaConfig, dict[str, LazyTensor], dict[str, Any], dict[str, Gemma2]]:
    """Configuration and lazily loaded tensors of an adaptation; no weight is read.

    Args:
        encoder: see `adapt_gemma2`.
        decoder: see `adapt_gemma2`.
        cross_attention: `"copy"` from the same layer's self-attention, as the paper
            does for equal towers; `"random"`, as it does for unequal ones; `"auto"`
            chooses like the paper. Copying needs equal widths.
        cross_norms: `"copy"` the norms around self-attention, the most similar
            weights; `"zeros"`, the identity of a new norm; `"auto"` copies them if the
            attention is copied: copied projections were trained behind those norms,
            random ones were not. Not published.
        initializer_std: standard deviation of random projections; 0.02 is Gemma's.
            Not published.
        seed: of the random projections; the same seed gives the same weights.
        dropout: rate of the result while training, in [0, 1).

    Returns:
        `(config, tensors, lineage, sources)`: a `T5GemmaConfig`, the tensors by path,
        a JSON-ready dict of what was adapted from what, and the two opened sources,
        `{"encoder": ..., "decoder": ...}`.

    Raises:
        ValueError: naming the wrong argument.
    """
    for name, value, accepted in (
        ("cross_attention", cross_attention, ("auto", "copy", "random")),
        ("cross_norms", cross_norms, ("auto", "copy", "zeros")),
    ):
        one_of(value, name, accepted)
    number(initializer_std, "initializer_std", above=0)
    seed = whole_number(seed, "seed", 0)
    with renamed(preset="encoder"):
        encoder = open_gemma2(encoder, "encoder")
    with renamed(preset="decoder"):
        decoder = encoder if decoder is None else open_gemma2(decoder, "decoder")
    sources = {"encoder": encoder, "decoder": decoder}
    _check_vocabularies(encoder, decoder)
    balanced = encoder.stack == decoder.stack
    if cross_attention == "auto":
        cross_attention = "copy" if balanced else "random"
    if cross_norms == "auto":
        cross_norms = "copy" if cross_attention == "copy" else "zeros"
    widths = encoder.stack.hidden_dim, decoder.stack.hidden_dim
    if cross_attention == "copy" and widths[0] != widths[1]:
        raise ValueError(
            "`cross_attention='copy'` needs towers of equal width: its keys are "
            f"projections of the encoder output; got widths {widths[0]} and "
            f"{widths[1]}. Use 'random'."
        )
    config = T5GemmaConfig(
        encoder.stack,
        decoder.stack,
        vocabulary_size=decoder.vocabulary_size,
        final_soft_cap=decoder.final_soft_cap,
        dropout=dropout,
        max_positions=min(encoder.max_positions, decoder.max_positions),
    )
    rows = WHOLE_ENCODER + DECODER
    rows += CROSS_ATTENTION if cross_attention == "copy" else ()
    rows += CROSS_NORMS if cross_norms == "copy" else ()
    copied = {}
    for path, side, source_path in rows:
        for i in range(sources[side].stack.num_layers if "{i}" in path else 1):
            copied[path.format(i=i)] = sources[side].tensors[source_path.format(i=i)]
    tensors = {}
    dtype = decoder.tensors["final_norm/scale"].dtype
    for path, shape in weight_maps.model_shapes(config).items():
        std = initializer_std if path.endswith("kernel") else 0.0
        initial = FreshTensor(path, shape, dtype, std, seed)
        tensors[path] = copied.get(path, initial)
    lineage = {
        "method": "adapt_gemma2",
        "encoder": encoder.name,
        "decoder": decoder.name,
        "balanced": balanced,
        "cross_attention": cross_attention,
        "cross_norms": cross_norms,
        "initializer_std": initializer_std if cross_attention == "random" else None,
        "seed": seed if cross_attention == "random" else None,
        "needs_warm_up": cross_attention == "random",
        "keras_t5gemma": VERSION,
    }
    return config, tensors, lineage, sources


def _check_vocabularies(encoder, decoder):
    sizes = encoder.vocabulary_size, decoder.vocabulary_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            "`encoder` and `decoder` must share one vocabulary; got "
            f"{sizes[0]} tokens ({encoder.name}) and {sizes[1]} ({decoder.name})."
        )
    found = {source.name: source.vocabulary for source in (encoder, decoder)}
    if None in found.values() or len(set(found.values())) == 1:
        return
    a, b = ((name, Tokenizer(data).get_vocabulary()) for name, data in found.items())
    differing = [
        i for i, pair in enumerate(zip(a[1], b[1], strict=False)) if len(set(pair)) > 1
    ]
    if differing or len(a[1]) != len(b[1]):
        first = differing[0] if differing else min(len(a[1]), len(b[1]))
        raise ValueError(
            "`encoder` and `decoder` must share one vocabulary; their tokenizers "
            f"differ from id {first} on: {a[0]} and {b[0]}."
        )


def adapt_to_folder(
    encoder: Any,
    decoder: Any = None,
    *,
    folder: str | Path,
    dtype: str | None = None,
    max_shard_size: float | str = 5,
    overwrite: bool = False,
    check: bool = True,
    verbose: bool = True,
    **options: Any,
) -> tuple[dict[str, Any], list[str]]:
    """Adapt Gemma 2 from file to file, with one tensor in memory at a time.

    The folder appears when everything is written and checked, or not at all; an
    interrupted run leaves no loadable preset and can be repeated.

    Args:
        encoder: see `adapt_gemma2`.
        decoder: see `adapt_gemma2`.
        folder: path of the preset to write: weights, config, checksums, and the
            tokenizer of the sources.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; `None` keeps the decoder
            source's.
        max_shard_size: of the largest weight file: a number of GB, or a size with a
            unit, e.g. `"500MB"`.
        overwrite: replace a checkpoint in `folder`.
        check: verify the adaptation identities before the folder appears; see
            `adaptation_checks.check_identities`.
        verbose: show a progress bar on standard error if it is a terminal.
        **options: see `plan_adaptation`.

    Returns:
        `(lineage, report)`: the dict that was saved, and the lines of the check.

    Raises:
        ValueError: see `adapt_gemma2`; or if `folder` is not empty.
        OSError: when there is not enough space on the disk.
    """
    folder = Path(folder)
    shard_bytes = parse_shard_size(max_shard_size)
    atomic.check_overwrite(folder, overwrite)
    config, tensors, lineage, sources = plan_adaptation(encoder, decoder, **options)
    stored = sources["decoder"].tensors["final_norm/scale"].dtype
    written = stored if dtype is None else parse_dtype(dtype)
    total = written.itemsize * sum(math.prod(t.shape) for t in tensors.values())
    atomic.check_free_space(folder, total)
    report = []
    with atomic_folder(folder) as staging:
        with progress_bar("Writing", total, True, verbose) as progress:
            keras_format.write(
                staging,
                config,
                tensors,
                written,
                lineage,
                _preprocessor(sources),
                max_shard_bytes=shard_bytes,
                progress=progress,
            )
        if check:
            largest = max(map(nbytes, tensors.values()))
            report = adaptation_checks.check_identities(
                staging, sources, max_bytes=largest
            )
    return lineage, report


def _preprocessor(sources):
    vocabulary = sources["decoder"].vocabulary or sources["encoder"].vocabulary
    if vocabulary is None:
        return None
    template = "instruction" if sources["decoder"].instruction_tuned else None
    return Seq2SeqLMPreprocessor(Tokenizer(vocabulary), template=template)

"""Decoder-only Gemma 2 to encoder-decoder T5Gemma (arXiv 2504.06225, section 3.2)."""

import importlib.metadata
from pathlib import Path

import numpy as np

from keras_t5gemma.checkpoints import atomic, keras_format, weight_maps
from keras_t5gemma.checkpoints.atomic import atomic_folder
from keras_t5gemma.checkpoints.lazy_tensors import FreshTensor, nbytes, parse_dtype
from keras_t5gemma.config import T5GemmaConfig
from keras_t5gemma.conversion import adaptation_checks
from keras_t5gemma.conversion.gemma2_reader import open_gemma2
from keras_t5gemma.modeling import weight_loading
from keras_t5gemma.modeling.backbone import Backbone
from keras_t5gemma.tokenization.preprocessor import Seq2SeqLMPreprocessor
from keras_t5gemma.tokenization.tokenizer import Tokenizer
from keras_t5gemma.utils.checks import number, one_of, whole_number
from keras_t5gemma.utils.progress import progress_bar

_TOWER = (
    "token_embedding/embeddings",
    "final_norm/scale",
    "block_{i}/pre_self_norm/scale",
    "block_{i}/self_attention/query/kernel",
    "block_{i}/self_attention/key/kernel",
    "block_{i}/self_attention/value/kernel",
    "block_{i}/self_attention/output/kernel",
    "block_{i}/post_self_norm/scale",
    "block_{i}/pre_mlp_norm/scale",
    "block_{i}/mlp/gate/kernel",
    "block_{i}/mlp/up/kernel",
    "block_{i}/mlp/down/kernel",
    "block_{i}/post_mlp_norm/scale",
)
# (path in the T5Gemma, source, path in the source): the rows of docs/facts.md,
# section 3.
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
# Not published; the paper maps every layer to the most similar weight.
CROSS_NORMS = tuple(
    (
        f"decoder/block_{{i}}/{place}_cross_norm/scale",
        "decoder",
        f"block_{{i}}/{place}_self_norm/scale",
    )
    for place in ("pre", "post")
)


def adapt_gemma2(encoder, decoder=None, dtype=None, **options):
    """Turn decoder-only Gemma 2 models into an encoder-decoder one.

    The encoder is a Gemma 2 that will see both ways; the decoder is a Gemma 2 with
    cross-attention added to every layer (arXiv 2504.06225, section 3.2). The result
    needs training before it is of use: "balanced" pairs continue from copied
    cross-attention, unbalanced ones first train cross-attention alone (the paper:
    1,000 steps), which `backbone.lineage["needs_warm_up"]` says.

    Args:
        encoder: a Gemma 2: a KerasHub preset name (`"gemma2_9b_en"`), a folder of
            KerasHub's or transformers', an `hf://` or `kaggle://` handle, or a live
            `keras_hub.models.GemmaBackbone` or `GemmaCausalLM`.
        decoder: likewise; `None` takes the encoder's.
        dtype: dtype policy of the result, or its name; `None` is Keras's.
        **options: see `plan_adaptation`: `cross_attention`, `cross_norms`,
            `initializer_std`, `seed`, `dropout`.

    Returns:
        A `Backbone`.

    Raises:
        ValueError: for a source that is no Gemma 2, vocabularies that differ, or
            tensors that do not fit, named.
        OSError: when a download fails, with what to do.
    """
    config, tensors, lineage, _ = plan_adaptation(encoder, decoder, **options)
    return weight_loading.fill(Backbone, config, tensors, lineage=lineage, dtype=dtype)


def plan_adaptation(
    encoder,
    decoder=None,
    cross_attention="auto",
    cross_norms="auto",
    initializer_std=0.02,
    seed=0,
    dropout=0.0,
):
    """What goes where, before anything is read.

    Args:
        encoder: see `adapt_gemma2`.
        decoder: see `adapt_gemma2`.
        cross_attention: `"copy"` from the same layer's self-attention, which the
            paper does when both towers are equal; `"random"`, which it does when
            they are not; `"auto"` chooses that way. Copying needs equal widths.
        cross_norms: `"copy"` the norms around self-attention, the most similar
            weights there are; `"zeros"`, the identity that a new norm starts as;
            `"auto"` does as with the attention: copied weights were trained behind
            those norms, random ones were not. Not published.
        initializer_std: standard deviation of random projections; 0.02 is Gemma's.
            Not published.
        seed: of the random projections; the same seed gives the same weights.
        dropout: rate of the result while training, in [0, 1).

    Returns:
        `(config, tensors, lineage, sources)`: a `T5GemmaConfig`, the result's unread
        tensors by path, a JSON-ready dict, and the two opened sources.

    Raises:
        ValueError: naming the argument that is wrong.
    """
    for name, value, accepted in (
        ("cross_attention", cross_attention, ("auto", "copy", "random")),
        ("cross_norms", cross_norms, ("auto", "copy", "zeros")),
    ):
        one_of(value, name, accepted)
    number(initializer_std, "initializer_std", above=0)
    seed = whole_number(seed, "seed", 0)
    reads = open_gemma2(encoder, "encoder")
    writes = reads if decoder is None else open_gemma2(decoder, "decoder")
    sources = {"encoder": reads, "decoder": writes}
    _check_vocabularies(reads, writes)
    balanced = reads.stack == writes.stack
    if cross_attention == "auto":
        cross_attention = "copy" if balanced else "random"
    if cross_norms == "auto":
        cross_norms = "copy" if cross_attention == "copy" else "zeros"
    widths = reads.stack.hidden_dim, writes.stack.hidden_dim
    if cross_attention == "copy" and widths[0] != widths[1]:
        raise ValueError(
            "`cross_attention='copy'` needs towers of equal width: its keys read the "
            f"encoder; got widths {widths[0]} and {widths[1]}. Use 'random'."
        )
    config = T5GemmaConfig(
        reads.stack,
        writes.stack,
        vocabulary_size=writes.vocabulary_size,
        final_soft_cap=writes.final_soft_cap,
        dropout=dropout,
        max_positions=min(reads.max_positions, writes.max_positions),
    )
    rows = WHOLE_ENCODER + DECODER
    rows += CROSS_ATTENTION if cross_attention == "copy" else ()
    rows += CROSS_NORMS if cross_norms == "copy" else ()
    found = {}
    for ours, side, theirs in rows:
        for i in range(sources[side].stack.num_layers if "{i}" in ours else 1):
            found[ours.format(i=i)] = sources[side].tensors[theirs.format(i=i)]
    tensors = {}
    fresh_dtype = writes.tensors["final_norm/scale"].dtype
    for path, shape in weight_maps.model_shapes(config).items():
        std = initializer_std if path.endswith("kernel") else 0.0
        tensors[path] = found.get(path) or FreshTensor(
            path, shape, fresh_dtype, std, seed
        )
    lineage = {
        "method": "adapt_gemma2",
        "encoder": reads.name,
        "decoder": writes.name,
        "balanced": balanced,
        "cross_attention": cross_attention,
        "cross_norms": cross_norms,
        "initializer_std": initializer_std if cross_attention == "random" else None,
        "seed": seed if cross_attention == "random" else None,
        "needs_warm_up": cross_attention == "random",
        "keras_t5gemma": importlib.metadata.version("keras-t5gemma"),
    }
    return config, tensors, lineage, sources


def _check_vocabularies(reads, writes):
    sizes = reads.vocabulary_size, writes.vocabulary_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            "`encoder` and `decoder` must share one vocabulary; got "
            f"{sizes[0]} tokens ({reads.name}) and {sizes[1]} ({writes.name})."
        )
    files = reads.tokenizer_file, writes.tokenizer_file
    if all(files) and Path(files[0]).read_bytes() != Path(files[1]).read_bytes():
        raise ValueError(
            "`encoder` and `decoder` must share one vocabulary; their tokenizer "
            f"files differ: {files[0]} and {files[1]}."
        )


def adapt_to_folder(
    encoder,
    decoder=None,
    *,
    folder,
    dtype=None,
    max_shard_size=5e9,
    overwrite=False,
    check=True,
    verbose=True,
    **options,
):
    """`adapt_gemma2` from file to file: one tensor is in memory at a time.

    The folder appears when everything is written and checked, or not at all; a run
    that was killed leaves nothing that loads and is simply run again.

    Args:
        encoder: see `adapt_gemma2`.
        decoder: see `adapt_gemma2`.
        folder: path of the preset to write: weights, config, checksums, and the
            tokenizer of the sources.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; `None` keeps the decoder
            source's.
        max_shard_size: bytes of the largest weight file.
        overwrite: replace a checkpoint that is there.
        check: verify the adaptation identities on the result before it appears; see
            `adaptation_checks.check_identities`.
        verbose: show a progress bar on standard error when it is a terminal.
        **options: see `plan_adaptation`.

    Returns:
        `(lineage, report)`: the dict that was saved, and what the check found, lines
        of text.

    Raises:
        ValueError: see `adapt_gemma2`; or when `folder` holds something.
        OSError: when there is not enough room on the disk.
    """
    folder = Path(folder)
    atomic.check_is_new(folder, overwrite)
    config, tensors, lineage, sources = plan_adaptation(encoder, decoder, **options)
    stored = sources["decoder"].tensors["final_norm/scale"].dtype
    dtype = stored if dtype is None else parse_dtype(dtype)
    count = sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
    atomic.check_room(folder, count * dtype.itemsize)
    report = []
    with atomic_folder(folder) as staging:
        with progress_bar("Writing", count * dtype.itemsize, True, verbose) as progress:
            keras_format.write(
                staging,
                config,
                tensors,
                dtype,
                lineage,
                _preprocessor(sources),
                max_shard_size=max_shard_size,
                progress=progress,
            )
        if check:
            largest = max(map(nbytes, tensors.values()))
            report = adaptation_checks.check_identities(
                staging, sources, max_bytes=largest
            )
    return lineage, report


def _preprocessor(sources):
    file = sources["decoder"].tokenizer_file or sources["encoder"].tokenizer_file
    if file is None:
        return None
    tuned = sources["decoder"].instruction_tuned
    return Seq2SeqLMPreprocessor(
        Tokenizer(file), template="instruction" if tuned else None
    )

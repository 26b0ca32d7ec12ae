"""Memory planned by `plan` against XLA's memory analysis, on small models.

    python benchmarks/planner.py [--cases equal "fsdp 8 x 1"] [--json]

The Keras training step is compiled by JAX for one CPU or 8 simulated ones, and not run.

state MB      arguments of the step: weights and optimizer; planned and compiled.
step MB       peak of temporary memory; planned and compiled (`temp_size_in_bytes`).

XLA for CPUs has two schedulers. The default one optimizes concurrency and ignores
memory and rematerialization; `xla_cpu_enable_concurrency_optimized_scheduler=false`
selects the one that minimizes memory, as on a GPU or TPU.
"""

import argparse
import json
import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_cpu_enable_concurrency_optimized_scheduler=false "
    "--xla_force_host_platform_device_count=8"
)

import jax
import keras
import numpy as np

import keras_t5gemma as kt
from keras_t5gemma.config import StackConfig, T5GemmaConfig
from keras_t5gemma.planning.costs import Job, evaluate

SAME = StackConfig(2, 128, 512, 4, 2, 32)
NARROW = StackConfig(3, 192, 384, 4, 4, 48)
WIDE = StackConfig(2, 256, 1024, 4, 2, 64)
EIGHT = StackConfig(2, 256, 512, 8, 8, 32)
# name: encoder, decoder, vocabulary, batch, lengths, other arguments of `Job`
ONE = {
    "equal": (SAME, SAME, 2048, 4, (256, 256), {}),
    "long source": (NARROW, SAME, 2048, 4, (384, 128), {}),
    "long target": (SAME, NARROW, 4096, 4, (128, 384), {}),
    "in blocks": (SAME, SAME, 2048, 1, (2048, 128), {}),
    "vocabulary": (SAME, SAME, 32768, 2, (128, 128), {}),
    "weights": (WIDE, WIDE, 2048, 1, (64, 64), {}),
    "weights, clipped": (WIDE, WIDE, 2048, 1, (64, 64), {"clip": 1.0}),
    "LoRA": (SAME, SAME, 2048, 4, (256, 256), {"lora_rank": 8}),
    "long source, clipped": (NARROW, SAME, 2048, 4, (384, 128), {"clip": 1.0}),
    "mixed_bfloat16": (SAME, SAME, 2048, 4, (256, 256), {"dtype": "mixed_bfloat16"}),
}
# strategy, data axis, model axis
MESHES = (
    ("data", 8, 1),
    ("fsdp", 8, 1),
    ("fsdp", 2, 4),
    ("tensor", 1, 8),
)
MESH_CASE = (EIGHT, EIGHT, 4096, 8, (256, 128), {})


def make_job(case, rematerialize, devices=1):
    """A `Job` of a row of `ONE`."""
    encoder, decoder, vocabulary, batch, length, more = case
    more = dict(more)
    optimizer = keras.optimizers.AdamW(1e-3, global_clipnorm=more.pop("clip", None))
    return Job(
        T5GemmaConfig(encoder, decoder, vocabulary_size=vocabulary),
        devices,
        10**12,
        batch,
        length,
        optimizer,
        **{"dtype": "float32", **more},
        rematerialize=rematerialize,
        cpu=True,
    )


def compiled_step(job):
    """Compile the training step of a job on the current mesh."""
    backbone = kt.Backbone(job.config, dtype=job.dtype)
    if job.lora_rank:
        backbone.enable_lora(job.lora_rank)
    model = kt.Seq2SeqLM(backbone)
    kind = type(job.optimizer)
    optimizer = kind.from_config(job.optimizer.get_config())
    model.compile(optimizer=optimizer, rematerialize=job.rematerialize)
    source, target = (np.ones((job.batch, n), "int32") for n in job.length)
    x = {
        "encoder_token_ids": source,
        "encoder_padding_mask": source,
        "decoder_token_ids": target,
        "decoder_padding_mask": target,
    }
    data = (x, target, target.astype("float32"))
    model._symbolic_build(data_batch=data)
    model.optimizer.build(model.trainable_variables)
    state = [
        [v.value for v in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
    ]

    def abstract(array, sharding=None):
        sharding = sharding or array.sharding
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    mesh = keras.distribution.distribution()
    if mesh is None:
        rows, out = jax.sharding.SingleDeviceSharding(jax.devices()[0]), None
    else:
        axes = jax.sharding.PartitionSpec("data")
        rows = jax.sharding.NamedSharding(mesh.device_mesh.backend_mesh, axes)
        out = (None, tuple(jax.tree.map(lambda v: v.sharding, state)))
    step = jax.jit(model.train_step, donate_argnums=0, out_shardings=out)
    data = jax.tree.map(lambda array: abstract(array, rows), data)
    return step.lower(tuple(jax.tree.map(abstract, state)), data).compile()


def compare(name, job, mesh=None, strategy="fsdp"):
    """One row: planned and compiled bytes per device."""
    keras.utils.clear_session(free_memory=False)  # Resets the mesh too.
    planned = evaluate(job, mesh or {"data": 1, "model": 1}, strategy)
    if mesh:
        with kt.distribute(strategy, **mesh):
            memory = compiled_step(job).memory_analysis()
    else:
        memory = compiled_step(job).memory_analysis()
    return {
        "case": name,
        "rematerialized": job.rematerialize,
        "planned state": planned.weights + planned.optimizer,
        "compiled state": memory.argument_size_in_bytes,
        "planned step": planned.step,
        "compiled step": memory.temp_size_in_bytes,
    }


def rows_of(cases):
    """Rows of the cases named in `cases`; of all if it is empty."""
    for rematerialize in (False, True):
        for name, case in ONE.items():
            if not cases or name in cases:
                yield compare(name, make_job(case, rematerialize))
        for strategy, data, model in MESHES:
            name = f"{strategy} {data} x {model}"
            if not cases or name in cases:
                mesh = {"data": data, "model": model}
                job = make_job(MESH_CASE, rematerialize, data * model)
                yield compare(name, job, mesh, strategy)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", default=[])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    columns = ("planned state", "compiled state", "planned step", "compiled step")
    if not args.json:
        print(f"| case | remat | {' MB | '.join(columns)} MB | ratio |")
        print("|---" * 7 + "|")
    for row in rows_of(args.cases):
        if args.json:
            print(json.dumps(row), flush=True)
            continue
        numbers = " | ".join(f"{row[c] / 1e6:.2f}" for c in columns)
        ratio = row["planned step"] / row["compiled step"]
        remat = "yes" if row["rematerialized"] else "no"
        print(f"| {row['case']} | {remat} | {numbers} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()

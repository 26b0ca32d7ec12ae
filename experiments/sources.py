"""Decoder-only Gemma 2 models, trained with KerasHub's GemmaCausalLM.

    KERAS_BACKEND=jax python experiments/sources.py small --data DATA --runs RUNS

Started again, it resumes from its last round.
"""

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path

import corpus
import keras
import keras_hub
import numpy as np

from keras_t5gemma.training.chunked_cross_entropy import token_losses

HEAD_DIM = 32


@dataclasses.dataclass(frozen=True)
class Size:
    """Shape and training of a source.

    Attributes:
        width: of the hidden states; a head for each `HEAD_DIM`.
        layers: number of layers.
        feed_forward: width of the feed-forward layers.
        learning_rate: the highest of the schedule.
        epochs: over all texts, in mixed precision; `None` for 4 million tokens of
            fewer texts, in float32.
        seed: of the initial weights and the order of the texts.
        start: size whose trained weights it starts from, with a new schedule.
    """

    width: int
    layers: int
    feed_forward: int
    learning_rate: float
    epochs: int | None = None
    seed: int = 0
    start: str | None = None


SIZES = {
    "small": Size(64, 2, 192, 4e-3),
    "medium": Size(128, 3, 384, 3e-3),
    "large": Size(192, 3, 512, 2e-3),
    "shallow": Size(64, 2, 192, 4e-3, epochs=1),
    "deep": Size(64, 8, 192, 3e-3, epochs=1),
    # Shallow again, another seed and twice the training.
    "twice": Size(64, 2, 192, 4e-3, epochs=2, seed=1),
    # Twice, and all texts once more, in another order.
    "thrice": Size(64, 2, 192, 2e-3, epochs=1, seed=2, start="twice"),
}
RESULTS = Path(__file__).parent / "results"
LENGTH, ROWS, ROUND = 256, 8, 200  # Tokens a row, rows a step, steps a round.


def make_source(size, dtype="float32"):
    """An untrained decoder-only model of a size of `SIZES`."""
    size = SIZES[size]
    heads = size.width // HEAD_DIM
    shape = size.width, size.layers, size.feed_forward, heads, heads
    return make_gemma2(*shape, dtype=dtype)


def make_gemma2(width, layers, feed_forward, heads, kv_heads, dtype="float32"):
    """An untrained GemmaCausalLM with all features of Gemma 2."""
    backbone = keras_hub.models.GemmaBackbone(
        vocabulary_size=corpus.tokenizer().vocabulary_size(),
        num_layers=layers,
        num_query_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_dim=width,
        intermediate_dim=2 * feed_forward,  # KerasHub counts both halves.
        head_dim=HEAD_DIM,
        query_head_dim_normalize=True,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        attention_logit_soft_cap=50.0,
        final_logit_soft_cap=30.0,
        use_sliding_window_attention=True,
        sliding_window_size=4096,
        dtype=dtype,
    )
    return keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=None)


class TokenLosses(keras.losses.Loss):
    """Chunked cross-entropy from the hidden states of a GemmaBackbone.

    Equal to Keras's loss on logits and twice as fast at these sizes.
    """

    def __init__(self, backbone):
        super().__init__("token_losses", reduction="mean_with_sample_weight")
        self.embedding = backbone.token_embedding

    def call(self, labels, states):
        losses, _, _ = token_losses(
            keras.ops.reshape(states, (-1, states.shape[-1])),
            keras.ops.convert_to_tensor(self.embedding.embeddings),
            keras.ops.reshape(labels, (-1,)),
            self.embedding.logit_soft_cap,
        )
        return keras.ops.reshape(losses, keras.ops.shape(labels))


def trainer(source, rate, steps):
    """A model that shares the weights and outputs hidden states, compiled."""
    model = keras.Model(source.backbone.input, source.backbone.output)
    model.compile(optimizer(rate, steps), TokenLosses(source.backbone))
    return model


def inputs(rows):
    """`x` and `y` of rows that are one token longer than the prediction."""
    ids = rows[:, :-1]
    return {"token_ids": ids, "padding_mask": np.ones_like(ids)}, rows[:, 1:]


def optimizer(rate, steps):
    """Adam; warm-up over 5 % of the steps, cosine decay to 10 %, global clip 1."""
    warmup = steps // 20
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warmup, 0.1, warmup_target=rate, warmup_steps=warmup
    )
    return keras.optimizers.Adam(schedule, beta_2=0.98, global_clipnorm=1.0)


class Rounds:
    """Training in rounds of `fit`, each saved with all state needed to resume."""

    def __init__(self, folder, model):
        self.file, self.model = Path(folder) / "state.npz", model
        self.log = []
        model.optimizer.build(model.trainable_variables)
        if self.file.exists():
            state = np.load(self.file)
            self.log = json.loads(str(state["log"]))
            for i, variable in enumerate(self._variables()):
                variable.assign(state[str(i)])

    def _variables(self):
        return [*self.model.variables, *self.model.optimizer.variables]

    def keep(self, entry):
        """Write the state and a log entry atomically."""
        self.log.append(entry)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        arrays = [keras.ops.convert_to_numpy(v) for v in self._variables()]
        arrays = {str(i): array for i, array in enumerate(arrays)}
        new = self.file.with_name("new.npz")
        np.savez(new, log=json.dumps(self.log), **arrays)
        os.replace(new, self.file)


def pretrain(size, data, runs, million_tokens=None):
    """Train a source; write a KerasHub preset and `log.json` to `runs/sources/SIZE`.

    Args:
        size: of `SIZES`.
        data: folder of the data.
        runs: folder of the runs.
        million_tokens: length of the training, by default that of the size.
    """
    folder = Path(runs) / f"sources/{size}"
    if (folder / "log.json").exists():
        return
    seed, epochs = SIZES[size].seed, SIZES[size].epochs
    keras.utils.set_random_seed(seed)
    everything = epochs is not None
    rows = corpus.chunks(corpus.for_sources(data, seed, everything), LENGTH)
    held_out = inputs(corpus.chunks(corpus.held_out(data), LENGTH))
    a_round = ROUND * ROWS
    if million_tokens is None:
        million_tokens = epochs * len(rows) * LENGTH / 1e6 if everything else 4
    rounds = int(million_tokens * 1e6) // (a_round * LENGTH)
    source = make_source(size, "mixed_bfloat16" if everything else "float32")
    if SIZES[size].start:
        preset = Path(runs) / f"sources/{SIZES[size].start}/preset"
        weights = keras_hub.models.GemmaBackbone.from_preset(str(preset)).get_weights()
        source.backbone.set_weights(weights)
    model = trainer(source, SIZES[size].learning_rate, rounds * ROUND)
    state = Rounds(folder, model)
    print(f"{size}: {model.count_params():,} parameters, {len(rows) * LENGTH:,} tokens")
    while len(state.log) < rounds:
        done, start = len(state.log), time.perf_counter()
        chosen = np.arange(done * a_round, (done + 1) * a_round) % len(rows)
        history = model.fit(
            *inputs(rows[chosen]), batch_size=ROWS, shuffle=False, verbose=0
        )
        seconds = time.perf_counter() - start
        entry = {
            "tokens": (done + 1) * a_round * LENGTH,
            "loss": history.history["loss"][0],
            "held_out_loss": model.evaluate(*held_out, batch_size=ROWS, verbose=0),
            "seconds": seconds,
        }
        state.keep(entry)
        print(size, json.dumps(entry), flush=True)
    saved = make_source(size).backbone
    saved.set_weights(source.backbone.get_weights())
    saved.save_to_preset(str(folder / "preset"))
    assets = folder / "preset/assets/tokenizer"
    assets.mkdir(parents=True, exist_ok=True)
    (assets / "vocabulary.spm").write_bytes(corpus.tokenizer().proto)
    (folder / "log.json").write_text(json.dumps(state.log, indent=1) + "\n")
    run = {"name": f"source/{size}", "start": SIZES[size].start}
    result = {"run": run, "log": state.log}
    path = RESULTS / f"source_{size}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--million-tokens", type=float)
    args = parser.parse_args()
    pretrain(args.size, args.data, args.runs, args.million_tokens)

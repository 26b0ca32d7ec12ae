"""Throughput of the pretraining objectives on one core, in tokens per second.

    python benchmarks/objectives.py [--tokens 4194304]

Each row is one call on texts of one length, the best of three.
"""

import argparse
import os
import time

os.environ.setdefault("KERAS_BACKEND", "torch")

import numpy as np

from keras_t5gemma.data.objectives import UL2, PrefixLM
from keras_t5gemma.utils.ragged import Ragged


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2**22)
    args = parser.parse_args()
    modes = {"[NLU]": 5, "[NLG]": 6, "[S2S]": 7}
    sentinels = range(200_000, 206_000)
    objectives = {
        "PrefixLM": PrefixLM(),
        "UL2 t5gemma2": UL2("t5gemma2", sentinels),
        "UL2 ul2": UL2("ul2", sentinels, modes),
    }
    rng = np.random.default_rng(0)
    ids = rng.integers(10, 200_000, args.tokens, "int32")
    print("| objective | tokens per text | million tokens per second |\n|---|---|---|")
    for name, objective in objectives.items():
        for length in (64, 512, 8192):
            rows = args.tokens // length
            texts = Ragged(np.full(rows, length), ids[: rows * length])
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                objective(texts, np.arange(rows))
                seconds.append(time.perf_counter() - start)
            speed = rows * length / min(seconds) / 1e6
            print(f"| {name} | {length} | {speed:.1f} |", flush=True)


if __name__ == "__main__":
    main()

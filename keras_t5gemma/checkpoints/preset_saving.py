"""`save_to_preset` of the backbone and of the tasks."""

import os

from keras_t5gemma.checkpoints.atomic import atomic_folder
from keras_t5gemma.utils.sizes import UNITS, parse_shard_size


class AtomicSaveToPreset:
    """Mixin before a KerasHub class: makes its `save_to_preset` atomic."""

    def save_to_preset(
        self, preset_dir: str | os.PathLike[str], max_shard_size: float | str = 10
    ) -> None:
        """Save weights, configuration and tokenizer into a folder, all or nothing.

        Args:
            preset_dir: path; an earlier checkpoint in it is replaced.
            max_shard_size: of the largest weight file: a number of GB, or a size with
                a unit, e.g. `"500MB"`.

        Raises:
            ValueError: for an invalid `max_shard_size`.
            OSError: when the disk is full; then nothing is left behind.
        """
        size = parse_shard_size(max_shard_size)
        # A task passes the limit on to its backbone, whose `save_to_preset` may be
        # this one; Keras counts in GiB.
        is_passed_on = isinstance(getattr(self, "backbone", None), AtomicSaveToPreset)
        limit = f"{size}B" if is_passed_on else size / UNITS["GiB"]
        with atomic_folder(preset_dir) as staging:
            super().save_to_preset(  # type: ignore[misc]
                os.fspath(staging), max_shard_size=limit
            )

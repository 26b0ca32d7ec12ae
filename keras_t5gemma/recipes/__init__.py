"""Complete trainings: `finetune` and `pretrain`, from files to a preset.

Typed options, run directories that resume, final scores and model cards live here. May
import every package but `cli`; `options` imports neither Keras nor a backend.
"""

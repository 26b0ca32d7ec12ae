"""Training: losses, distillation, optimizers, callbacks, backup, warm-up, metrics.

The parts that a task's `fit` puts together. May import `data`, `tokenization`,
`modeling` and the layers below them; builds no task of this package
and imports no recipe.
"""

"""Evaluation of encoders: tasks, candidates, metrics, and the harness.

`tasks` and `superglue` read data, `candidates` trains a model for a task, `measures`
scores it, `harness` repeats this over models, tasks and seeds. May import every package
below it: planning, tasks, generation, training and so on, not recipes or cli.
"""

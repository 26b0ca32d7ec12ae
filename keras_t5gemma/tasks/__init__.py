"""Tasks: `Seq2SeqLM`, `TextEmbedder`, `TextClassifier`, and their `fit`.

A task joins a backbone, a preprocessor and a head, and puts `data`, `training` and
`generation` together behind `fit`, `evaluate`, `generate`, `embed` and `classify`. May
import every layer below; knows neither evaluation, recipes nor the command line.
"""

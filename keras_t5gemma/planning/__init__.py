"""Memory and communication of a training run, before it starts.

The variables of a model and its optimizer without their memory, the activations of a
step, and the layout that fits. May import `tasks` and the layers below it; `options`
imports neither Keras nor a backend.
"""

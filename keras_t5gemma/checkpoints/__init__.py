"""Checkpoint formats: presets by name, files as lazily loaded tensors, atomic saves.

`presets` locates a preset, `checkpoint` opens it, the `*_format` modules read and write
configurations, the `*_file` modules tensors; `weight_maps` and `layout_transforms` map
names and layouts between formats. No model is built here. May import `distribution` and
the layers below it.
"""

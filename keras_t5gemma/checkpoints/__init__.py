"""Checkpoint formats: presets by name, files as lazily loaded tensors, atomic saves.

`presets` and `hub` locate a preset, `checkpoint` opens it; `keras_format`,
`keras_hub_format` and `huggingface` know its configuration, the `*_file` modules read
and write tensors, `integrity` verifies them; `weight_maps` and `layout_transforms` map
names and layouts between formats. `atomic`, `folder_lock`, `saved_files` and
`preset_saving` make saves safe. No model is built here. May import `distribution` and
the layers below it.
"""

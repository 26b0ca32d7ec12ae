"""Several devices and processes: `distribute`, mesh, sharding rules, process group.

`distribute` is the entry point, `layouts` decides how variables are split, `mesh`
shards arrays in model code, `process_group` joins processes, `prediction` runs
inference on all of them, and `shared_arrays` gathers arrays. May import `utils`,
`config`, `environment` and `_compat` only.
"""

"""Several devices and processes: `distribute`, mesh, sharding rules, process group.

`distribute` is the entry point, `layouts` decides how variables are split, `mesh`
shards arrays in model code, `process_group` joins processes. May import `utils`,
`config`, `environment` and `_compat` only.
"""

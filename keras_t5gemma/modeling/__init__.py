"""The network: masks, rotary embedding, attention, blocks, towers, backbone, heads.

`backbone` is the entry point; `towers` holds the forward pass of training,
generation and verification, `kv_cache` the cache that is passed through it, `heads`
pooling, `lora` the adapters; `weight_loading` and `deferred_init` read weights from a
checkpoint. May import `checkpoints`,
`distribution` and the layers below them; imports no text processing, losses or tasks.
"""

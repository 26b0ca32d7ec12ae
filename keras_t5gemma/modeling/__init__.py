"""The network: masks, rotary embedding, attention, blocks, towers, backbone, LoRA.

`backbone` is the entry point; `towers` holds the one forward pass of training,
generation and verification, `kv_cache` the cache that is passed through it, and
`weight_loading` reads weights from a checkpoint. May import `checkpoints`,
`distribution` and the layers below them; knows nothing of text, losses or tasks.
"""

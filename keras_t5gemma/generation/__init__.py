"""Generation: options, requests, the compiled decoding loop, sampling, beam search.

`Generator` turns a request into batches, `Engine` compiles the loop of `decoding`,
`beam` and `sampling` choose tokens, `torch_step` is the fast path on PyTorch,
`keras_hub_sampler` runs samplers of KerasHub, `scoring` computes log-probabilities of
given targets. May import `tokenization`, `modeling` and
the layers below them; knows tasks only as arguments.
"""

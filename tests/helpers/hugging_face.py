"""Small models of transformers with random weights."""

STACK = {
    "vocab_size": 480,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
}


def randomize(parameters, std=0.3):
    """Normal values, the same at every call."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(0, std)

"""Small models of transformers with random weights."""

WINDOW = 8  # Of `save_t5gemma`.
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


def save_t5gemma(folder, seed=0, dtype=None, **save):
    """A random model with unequal towers, weights large enough for soft caps.

    Args:
        folder: to write to.
        seed: of the weights.
        dtype: of PyTorch; `None` is float32.
        **save: options of `save_pretrained`.

    Returns:
        The folder.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    common = {"vocab_size": 200, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}
    config = transformers.T5GemmaConfig(
        encoder={
            **common,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
        },
        decoder={
            **common,
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 8,
        },
        vocab_size=200,
    )
    model = transformers.T5GemmaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 0.3 if name.endswith("norm.weight") else 0.5
            parameter.normal_(0, std)
    model.to(dtype or torch.float32).save_pretrained(folder, **save)
    return folder

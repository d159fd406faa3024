"""The language model and its tokenizer: loading, weights, which layers are tracked."""

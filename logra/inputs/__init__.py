"""Inputs: documents, rows, train examples, queries, batches, the model and its tokenizer."""

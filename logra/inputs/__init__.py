"""What comes in: documents, their rows and examples, queries, batches, the model and its tokenizer."""

"""Texts: documents, rows, train examples, queries, batches."""

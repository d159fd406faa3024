"""LoGra: training data attribution for language models (arXiv 2405.13954)."""

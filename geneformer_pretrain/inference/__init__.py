"""Embeddings, in-silico perturbation and evaluation with a trained model."""

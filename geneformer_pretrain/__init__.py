"""Fast, exact and restartable pretraining of Geneformer."""

__version__ = "0.2.0"

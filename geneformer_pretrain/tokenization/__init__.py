"""From counts of genes in cells to a corpus of tokens."""

"""From a corpus of tokenized cells to packed, masked micro-batches."""

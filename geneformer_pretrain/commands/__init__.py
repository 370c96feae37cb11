"""The commands of the command line, one module each; see `geneformer_pretrain.cli`."""

"""Run the command line: `python -m geneformer_pretrain COMMAND ...`."""

from geneformer_pretrain.cli import main

if __name__ == "__main__":
    main()

"""Pretrain Geneformer: `torchrun --nproc_per_node=N train.py [--config-name NAME] [KEY=VALUE ...]`.

Configurations are in hydra_config/; `--cfg job` shows the composed one, `--help` lists the choices.
"""

from geneformer_pretrain.training.main import main

if __name__ == "__main__":
    main()

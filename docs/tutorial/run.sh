#!/usr/bin/env bash
# The commands of docs/tutorial.md, on real cells: `make tutorial`. Needs the network for 59 MB; 7 minutes on a CPU.
# usage: docs/tutorial/run.sh PYTHON [FOLDER], from the repository's root. FOLDER (default: tutorial) gets all files.
set -euo pipefail

python=$1 folder=${2:-tutorial}
geneformer() { "$python" -m geneformer_pretrain "$@"; }
mkdir -p "$folder"

# 1. Cells: 1,000 nuclei of a human heart, from the test data of a package
archive=transcriptformer-0.6.1
if [ ! -e "$folder/heart.h5ad" ]; then
    "$python" -m pip download --quiet --no-deps --no-binary :all: "${archive/-/==}" --dest "$folder"
    tar -xzf "$folder/$archive.tar.gz" -C "$folder" --strip-components=3 "$archive/test/data/human_val.h5ad"
    mv "$folder/human_val.h5ad" "$folder/heart.h5ad"
    rm "$folder/$archive.tar.gz"
fi

# 2. Gene set, corpus, a look at it, two sides
geneformer gene-set build "$folder/heart.h5ad" --output "$folder/genes" --name heart --species "Homo sapiens" \
    --min-cells 3 --exact --max-tokens 512 --overwrite
geneformer tokenize "$folder/heart.h5ad" --gene-set "$folder/genes" --columns cell_type,cell_state \
    --output "$folder/corpus" --overwrite
geneformer inspect "$folder/corpus" --output "$folder/inspection" --overwrite
geneformer split "$folder/corpus" --fraction 0.2 --output "$folder/split" --overwrite

# 3. A small model
"$python" train.py data.path="$folder/split/train" data.validation_path="$folder/split/held_out" \
    data.gene_set="$folder/genes" data.cache_dir="$folder/cache" \
    model.num_hidden_layers=4 model.hidden_size=128 model.num_attention_heads=2 model.intermediate_size=256 \
    model.max_position_embeddings=512 training.num_train_steps=300 training.learning_rate=2e-3 \
    training.validate_every_n_steps=50 training.checkpoint_dir="$folder/run" training.resume_from_checkpoint=false \
    training.wandb_init_args=null
geneformer curves "$folder/run" --output "$folder/curves.png"

# 4. Embeddings, their worth, a perturbation
model=$folder/run/final_model
geneformer embed "$model" "$folder/heart.h5ad" --output "$folder/heart_embedded.h5ad" --overwrite
geneformer evaluate "$model" "$folder/heart.h5ad" --label cell_type --output "$folder/evaluation" --overwrite
geneformer perturb "$model" "$folder/split/held_out" --mode delete --max-cells 6 --output "$folder/deleted" --overwrite

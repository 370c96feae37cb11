#!/usr/bin/env bash
# The evaluation of docs/evaluation.md on real cells: two trainings of the 10m model on 800 heart nuclei, and what the
# better one is worth. One GPU, 6 minutes.
# usage: docs/tutorial/gpu.sh PYTHON [FOLDER], from the repository's root. FOLDER holds heart.h5ad (docs/tutorial.md,
# section 1) and gets all files.
set -euo pipefail

python=$1 folder=${2:-tutorial}
geneformer() { "$python" -m geneformer_pretrain "$@"; }

# The same cells as in the tutorial, with up to 2,048 genes each
geneformer gene-set build "$folder/heart.h5ad" --output "$folder/genes_2048" --name heart --species "Homo sapiens" \
    --min-cells 3 --exact --overwrite
geneformer tokenize "$folder/heart.h5ad" --gene-set "$folder/genes_2048" --columns cell_type,cell_state \
    --output "$folder/corpus_2048" --overwrite
geneformer split "$folder/corpus_2048" --fraction 0.2 --output "$folder/split_2048" --overwrite

# 32,768 tokens a step: an epoch of the 809 nuclei is 50 steps. More dropout than in 10m, as cells are few.
train() { # NAME STEPS
    "$python" train.py --config-name 10m data.path="$folder/split_2048/train" \
        data.validation_path="$folder/split_2048/held_out" data.gene_set="$folder/genes_2048" \
        data.cache_dir="$folder/cache" model.micro_batch_size=16 \
        model.hidden_dropout_prob=0.1 model.attention_probs_dropout_prob=0.1 \
        training.learning_rate=7e-4 training.warmup_steps=500 training.num_train_steps="$2" \
        training.validate_every_n_steps=500 training.keep_best=true training.log_every_n_steps=50 \
        training.checkpoint_dir="$folder/$1" training.resume_from_checkpoint=false training.wandb_init_args=null
}
train short 3000
train long 10000

# The labels of nuclei that the models have seen (without labels) and of held-out ones together; then the latter alone
for run in short long; do
    for label in cell_type cell_state; do
        geneformer evaluate "$folder/$run/best_model" "$folder/corpus_2048" --counts "$folder/heart.h5ad" \
            --label $label --output "$folder/evaluation_${run}_$label" --overwrite
    done
    geneformer evaluate "$folder/$run/best_model" "$folder/split_2048/held_out" --label cell_type \
        --output "$folder/evaluation_${run}_held_out" --overwrite
done

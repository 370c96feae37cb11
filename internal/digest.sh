#!/usr/bin/env bash
# Writes internal/gitingest.txt: every file of the repository in one text, for reading by a language model.
# usage: internal/digest.sh GITINGEST   (the gitingest program; `make digest` installs it and calls this)
set -euo pipefail
cd "$(dirname "$0")/.."

gitingest=$(realpath --no-symlinks "$(command -v "$1")")
git rev-parse --git-dir > /dev/null

# A copy of the files that git knows, without data, charts, licence text and the digest itself: nothing local gets in.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
mkdir "$copy/geneformer-pretrain"
git ls-files -z --cached --others --exclude-standard -- . \
    ':!LICENSE' ':!internal/gitingest.txt' ':!docs/*.svg' ':!sample_data/*.parquet' ':!sample_data/vocab.txt' |
    while IFS= read -r -d '' file; do
        if [ -f "$file" ]; then cp --parents "$file" "$copy/geneformer-pretrain"; fi
    done

# gitingest counts tokens with a table that it downloads. A proxy that refuses at once and no cache make the
# digest the same with and without a network, and on every machine.
export TIKTOKEN_CACHE_DIR='' HTTPS_PROXY=http://127.0.0.1:9 https_proxy=http://127.0.0.1:9
target=$PWD/internal/gitingest.txt
cd "$copy"
if ! "$gitingest" geneformer-pretrain --output "$target" > log 2>&1; then
    cat log >&2
    exit 1
fi
echo "internal/gitingest.txt: $(wc -c < "$target") bytes"

# NVIDIA's image brings torch 2.13, Transformer Engine, NCCL and cuDNN built for each other (Python 3.12, CUDA 13;
# driver 580 or newer). They stay as they are; everything else is installed at the versions of requirements.txt.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE_IMAGE}
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# What must not be replaced becomes a constraint, for this installation and for later ones in the container. It takes
# the place of the image's own constraint file, which fixes every package it contains.
ARG KEEP='^(torch|torchvision|torchao|triton|pytorch[-_]triton|numpy|transformer[-_]engine|flash[-_]attn|apex|nvidia[-_]|cuda[-_])'
ENV PIP_CONSTRAINT=/etc/pip/keep.txt PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore
COPY requirements.txt /tmp/requirements.txt
RUN mkdir -p /etc/pip \
 && python -m pip list --format=freeze | grep -E "${KEEP}" > "${PIP_CONSTRAINT}" \
 && grep -vE '^(torch|numpy)==' /tmp/requirements.txt > /tmp/rest.txt \
 && python -m pip install --no-cache-dir --requirement /tmp/rest.txt megatron-fsdp==0.6.1 \
 && python -m pip list --format=freeze | grep -E "${KEEP}" | diff "${PIP_CONSTRAINT}" - \
 && rm /tmp/requirements.txt /tmp/rest.txt

# Runs as root or as any other user (docker run --user): caches go to /tmp, the repository is writable.
# VENV=none: make uses the image's interpreter instead of an environment of its own.
# Compiled code goes to the folder of caches, which may be mounted to outlive the container.
ENV HOME=/tmp USER=geneformer VENV=none TORCHINDUCTOR_CACHE_DIR=/workspace/cache/torchinductor
WORKDIR /workspace
COPY . .
RUN chmod -R a+rwX .

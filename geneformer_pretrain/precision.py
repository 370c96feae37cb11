"""The precision policy: FP32 main weights and optimizer state, one compute dtype for everything else."""

import torch

from .config import ComputeDtype, ConfigError


def compute_dtype(choice: ComputeDtype, device: torch.device) -> torch.dtype:
    """Dtype of activations and working copies of weights on `device`.

    Raises
    ------
    ConfigError
        BF16 on a GPU without it.
    """
    if choice is ComputeDtype.float32 or (choice is ComputeDtype.auto and device.type == "cpu"):
        return torch.float32
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise ConfigError(
            f"{torch.cuda.get_device_name(device)} has no BF16 matrix units; set training.compute_dtype=float32."
        )
    return torch.bfloat16

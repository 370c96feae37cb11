"""Files of named tensors: safetensors, written and read; pickles of PyTorch, only read and without running code."""

import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write contiguous tensors in host memory to one file and bring it onto the disk.

    Raises
    ------
    OSError
        Naming the file.
    """
    try:
        save_file(tensors, path, metadata=dict(metadata))
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    # The library lets nobody else read the file, whatever the umask. The folder was made under it.
    path.chmod(path.parent.stat().st_mode & 0o666)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file; its `get_tensor` maps values from the file, so that only what is used is read.

    Raises
    ------
    ValueError
        If it is not one, or is cut off.
    """
    try:
        with _utf8_name(path) as name:
            return safe_open(name, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error})") from None


def load_pickled(path: Path) -> dict[str, Tensor]:
    """Open a flat dictionary of tensors that `torch.save` wrote, mapped from the file; executes nothing in it.

    Raises
    ------
    ValueError
        If it is damaged or holds anything but tensors.
    """
    try:
        with _utf8_name(path) as name:
            content = torch.load(name, weights_only=True, mmap=zipfile.is_zipfile(name), map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(refusal(path, error)) from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} is not a flat dictionary of tensors")
    return dict(content)


@contextmanager
def _utf8_name(path: Path) -> Iterator[str]:
    """Give a name for a file that is UTF-8, as what maps files into memory wants it, whatever its own name is."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)
    else:
        yield os.fspath(path)


def refusal(path: Path, error: pickle.UnpicklingError) -> str:
    """Explain a refused pickle; PyTorch's words would advise to load it with whatever code it holds."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused is None:
        return f"{path} is damaged or no checkpoint"
    return f"{path} holds other things than tensors: refused to unpickle {refused[1]}"

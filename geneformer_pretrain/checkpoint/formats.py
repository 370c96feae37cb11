"""The two file formats of a checkpoint: one file, or one file per rank.

Both hold the same thing, a flat dictionary of tensors by name, and nothing else: no Python object is ever
unpickled from a checkpoint. Either can be read into whole tensors and into sharded ones, because everything
is described by one small concept, `Shards`: which rectangular pieces of a tensor this rank holds.
"""

import math
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from geneformer_pretrain.checkpoint.manifest import sync_file
from geneformer_pretrain.checkpoint.shards import Shards, TensorInfo
from geneformer_pretrain.errors import root_cause


class CheckpointFormat(Protocol):
    """What the store asks of a format."""

    def write(self, folder: Path, tensors: Mapping[str, Shards], group: dist.ProcessGroup | None) -> list[str]:
        """Write and fsync the files; called on every rank of `group`. Returns the names this rank wrote."""

    def index(self, folder: Path) -> dict[str, TensorInfo]:
        """Read what tensors a checkpoint holds, not their values."""

    def read(self, folder: Path, targets: Mapping[str, Shards]) -> None:
        """Copy values into the targets' pieces; needs no other rank. Names and shapes match the index."""


@contextmanager
def refusing_objects(path: Path) -> Iterator[None]:
    """Say what is wrong with a file; PyTorch's words would advise to load it with whatever code it holds."""
    try:
        yield
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise ValueError(f"{path} is damaged or no checkpoint") from None
        raise ValueError(f"{path} holds other things than tensors: refused to unpickle {refused[1]}") from None


class FullFormat:
    """One file with every tensor whole, written by rank 0."""

    FILE = "checkpoint.pt"

    def write(self, folder: Path, tensors: Mapping[str, Shards], group: dist.ProcessGroup | None) -> list[str]:
        """See `CheckpointFormat.write`."""
        if group is not None and dist.get_rank(group) != 0:
            return []
        with open(folder / self.FILE, "wb") as file:
            torch.save({name: shards.whole(name) for name, shards in tensors.items()}, file)
            sync_file(file)
        return [self.FILE]

    def _open(self, folder: Path) -> dict[str, torch.Tensor]:
        path = folder / self.FILE
        with refusing_objects(path):
            # weights_only refuses everything but tensors and plain containers; mmap reads only what is copied.
            content = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
            raise ValueError(f"{path} is not a flat dictionary of tensors")
        return content

    def index(self, folder: Path) -> dict[str, TensorInfo]:
        """See `CheckpointFormat.index`."""
        return {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in self._open(folder).items()}

    def read(self, folder: Path, targets: Mapping[str, Shards]) -> None:
        """See `CheckpointFormat.read`."""
        tensors = self._open(folder)
        for name, target in targets.items():
            for offset, piece in target.pieces.items():
                region = tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))
                piece.copy_(tensors[name][region])


class ShardedFormat:
    """A torch distributed checkpoint (DCP): every rank writes its shards, rank 0 `.metadata` as well."""

    def write(self, folder: Path, tensors: Mapping[str, Shards], group: dist.ProcessGroup | None) -> list[str]:
        """See `CheckpointFormat.write`."""
        with warnings.catch_warnings():
            if group is None:
                warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)  # torch 2.10 about its own use
            dcp_save(
                dict(tensors),
                storage_writer=_Writer(folder),
                planner=_SavePlanner(),
                process_group=group,
                no_dist=group is None,
            )
        rank = dist.get_rank(group) if group is not None else 0
        names = sorted(path.name for path in folder.glob(f"__{rank}_*.distcp"))
        return [*names, ".metadata"] if rank == 0 else names

    def index(self, folder: Path) -> dict[str, TensorInfo]:
        """See `CheckpointFormat.index`."""
        tensors = _read_tensor_metadata(_Reader(folder).read_metadata())
        return {name: TensorInfo(tuple(t.size), t.properties.dtype) for name, t in tensors.items()}

    def read(self, folder: Path, targets: Mapping[str, Shards]) -> None:
        """See `CheckpointFormat.read`."""
        reader = _Reader(folder)
        metadata = reader.read_metadata()
        saved = _read_tensor_metadata(metadata)
        items = []
        for name, target in targets.items():
            needed = create_read_items_for_chunk_list(name, saved[name], target.chunks())
            covered = sum(math.prod(item.lengths) for item in needed)
            wanted = sum(piece.numel() for piece in target.pieces.values())
            if covered != wanted:
                raise ValueError(f"{folder} holds {covered} of the {wanted} elements of {name} wanted here")
            items += needed
        planner = _LoadPlanner(targets)
        reader.set_up_storage_reader(metadata, is_coordinator=False)
        with refusing_objects(folder):
            reader.read_data(LoadPlan(items), planner).wait()


FORMATS: dict[str, CheckpointFormat] = {"full": FullFormat(), "sharded": ShardedFormat()}


class _Writer(FileSystemWriter):
    def __init__(self, folder: Path) -> None:
        # Tensors are in host memory already: copying ahead would only open a CUDA context on device 0.
        super().__init__(folder, sync_files=True, per_thread_copy_ahead=0)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # On their way to the other ranks errors lose what caused them: that the disk is full, for instance.
            raise RuntimeError(root_cause(error)) from error

    def storage_meta(self) -> None:
        # The default records the absolute path as a pickled Path, whose class differs between Pythons.
        return None


class _SavePlanner(DefaultSavePlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        return SavePlan(
            [
                WriteItem(
                    index=MetadataIndex(name, chunk.offsets),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=chunk,
                        properties=TensorProperties(dtype=shards.info.dtype),
                        size=torch.Size(shards.info.shape),
                    ),
                )
                for name, shards in self.state_dict.items()
                for chunk in shards.chunks()
            ]
        )

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        return self.state_dict[index.fqn].pieces[tuple(index.offset)]


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self, targets: Mapping[str, Shards]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._targets = targets

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        return self._targets[index.fqn].pieces[tuple(index.offset)]


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"{self.path}/.metadata holds a {type(metadata).__name__}")
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles the classes that describe tensors, and refuses every other name before it is looked up."""

    ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        **{
            (cls.__module__, cls.__qualname__): cls
            for cls in (
                _StorageInfo,
                torch.Size,
                dcp_metadata._MEM_FORMAT_ENCODING,
                ChunkStorageMetadata,
                Metadata,
                MetadataIndex,
                TensorProperties,
                TensorStorageMetadata,
            )
        },
        ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
        **{("torch", str(v)[6:]): v for v in vars(torch).values() if isinstance(v, torch.dtype)},
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(
                f"refused to unpickle {module}.{name}: .metadata may hold descriptions of tensors only"
            )
        return self.ALLOWED[module, name]


def _read_tensor_metadata(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    tensors = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"the checkpoint's entry {name} is no tensor: refused, since it is read by pickle")
        tensors[name] = entry
    return tensors

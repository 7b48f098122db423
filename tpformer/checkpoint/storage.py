"""Writing safetensors files of whole tensors from many ranks at once, as storage of torch.distributed.checkpoint.

The coordinator lays the tensors out over files and writes the headers; then each rank writes its chunks at their
places. Nothing is gathered, and a rank makes one chunk's numbers at a time.
"""

import itertools
import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from tpformer.checkpoint.chunks import Chunk
from tpformer.checkpoint.digests import Digest, bytes_of
from tpformer.checkpoint.files import naming
from tpformer.checkpoint.layout import MAX_FILE_BYTES, File, Whole, arrange
from tpformer.checkpoint.reading import summary


def write_chunks(found: list[Chunk], writer: "SafetensorsWriter", group: dist.ProcessGroup | None) -> None:
    """Write every rank's chunks; collective over the group (None: this process alone), which must have a CPU backend.

    Raises, on every rank the same, the first rank's error: OSError for a disk that is full, ValueError for chunks
    that do not make up their tensors.
    """
    state: dict[str, list[Chunk]] = {}
    for chunk in found:
        state.setdefault(chunk.key, []).append(chunk)
    planner = ChunkPlanner()
    try:
        if group is None:
            _save_alone(state, planner, writer)
        else:
            dcp.save(state, storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as caught:  # which is no Exception, and has each rank's error with its stack
        _, (error, _) = min(caught.failures.items())
        raise error from None


class ChunkPlanner(dcp.DefaultSavePlanner):
    """Each rank writes the chunks that it has; the state dict is a list of them by tensor.

    Raises ValueError for chunks of which a tensor is not made up, or two of the same place: torch would drop one.
    """

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._chunks: dict[MetadataIndex, Chunk] = {}

    def create_local_plan(self) -> SavePlan:
        """This rank's items."""
        self._chunks = {_index(chunk): chunk for same in self.state_dict.values() for chunk in same}
        self.plan = SavePlan([_item(index, chunk) for index, chunk in self._chunks.items()])
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """On the coordinator: as it is, if the chunks tile their tensors; torch looks for those that overlap."""
        seen: set[MetadataIndex] = set()
        wholes: dict[str, Whole] = {}
        missing: dict[str, int] = {}
        for item in (item for plan in all_plans for item in plan.items):
            data, key = _data(item), item.index.fqn
            if item.index in seen:
                raise ValueError(f"two ranks would write {key} at {tuple(data.chunk.offsets)}: one must be a copy")
            seen.add(item.index)
            if (whole := _whole(data)) != wholes.setdefault(key, whole):
                raise ValueError(f"{key} is {whole} on one rank and {wholes[key]} on another")
            missing[key] = missing.get(key, math.prod(data.size)) - math.prod(data.chunk.sizes)
        if wrong := [f"{key} lacks {count} numbers" for key, count in missing.items() if count]:
            raise ValueError(f"the ranks' parts are not the whole: {summary(wrong)}")
        return super().create_global_plan(all_plans)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """An item's numbers, contiguous in host memory."""
        return self._chunks[write_item.index].numbers()


class SafetensorsWriter(StorageWriter):
    """Writes whole tensors to files in `directory`, which it makes; then publish(files, digests) on the coordinator."""

    def __init__(
        self,
        directory: Path,
        publish: Callable[[list[File], list[Digest]], None],
        max_file_bytes: int = MAX_FILE_BYTES,
    ):
        self.directory, self.publish, self.max_file_bytes = directory, publish, max_file_bytes
        self._files: list[File] = []

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Torch chooses among its own writers by it; this one is named where it is used."""
        return False

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A writer writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do before the plan."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator: lay out the files, make them, and tell each rank where its tensors begin."""
        found = {item.index.fqn: _data(item) for plan in plans for item in plan.items}
        self._files = arrange({key: _whole(data) for key, data in found.items()}, self.max_file_bytes)
        for file in self._files:
            path = self.directory / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with naming(path), path.open("wb") as opened:
                opened.write(file.header)
                opened.truncate(file.bytes)
                os.fsync(opened.fileno())  # the ranks that write to it may be on other machines
        where = {key: (file.name, begin) for file in self._files for key, begin in file.offsets.items()}
        return [replace(plan, storage_data={i.index.fqn: where[i.index.fqn] for i in plan.items}) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items, and wait until they are on the disk."""
        files: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            files.setdefault(plan.storage_data[item.index.fqn][0], []).append(item)
        results: list[WriteResult] = []
        for name, items in files.items():
            with naming(self.directory / name):
                results += _write(self.directory / name, items, plan, planner)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator: all numbers are on the disk."""
        sizes = {
            MetadataIndex(key, chunk.offsets): tuple(chunk.sizes)
            for key, tensor in metadata.state_dict_metadata.items()
            for chunk in getattr(tensor, "chunks", ())
        }
        digests = [
            Digest(r.index.fqn, tuple(r.index.offset or ()), sizes[r.index], r.storage_data)
            for r in itertools.chain(*results)
        ]
        order = {key: number for number, key in enumerate(key for file in self._files for key in file.offsets)}
        self.publish(self._files, sorted(digests, key=lambda digest: (order[digest.key], digest.start)))


def runs(shape: tuple[int, ...], start: tuple[int, ...], size: tuple[int, ...]) -> list[int]:
    """Where, in a tensor of this shape, each stretch of a box begins whose numbers are one after another.

    The stretches are equally long and come in the order of the box's numbers.
    """
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    begins = np.array([sum(a * stride for a, stride in zip(start, strides, strict=True))])
    for dim in range(_inner(shape, size)):
        begins = np.add.outer(begins, np.arange(size[dim]) * strides[dim]).reshape(-1)
    return list(begins.tolist())


def _inner(shape: tuple[int, ...], size: tuple[int, ...]) -> int:
    """The dim from which on the numbers of a box are one after another: all dims after it are whole."""
    dim = len(shape)
    while dim > 1 and shape[dim - 1] == size[dim - 1]:
        dim -= 1
    return max(dim - 1, 0)


def _write(path: Path, items: list[WriteItem], plan: SavePlan, planner: SavePlanner) -> Iterator[WriteResult]:
    """Write some items of one file."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        for item in items:
            numbers = planner.resolve_data(item)
            assert isinstance(numbers, Tensor)
            content = bytes_of(numbers)
            data, (_, begin) = _data(item), plan.storage_data[item.index.fqn]
            shape, size = tuple(data.size), tuple(data.chunk.sizes)
            places = runs(shape, tuple(data.chunk.offsets), size)
            length = len(content) // len(places)
            for number, first in enumerate(places):
                part = content[number * length : (number + 1) * length]
                _write_all(descriptor, part, begin + first * numbers.itemsize)
            yield WriteResult(item.index, len(content), zlib.crc32(content))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, content: memoryview, offset: int) -> None:
    """The system writes at most 2 GiB at once, and less where the disk is almost full."""
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def _save_alone(state: dict[str, Any], planner: ChunkPlanner, writer: SafetensorsWriter) -> None:
    """What `dcp.save` does, step by step: without a process group that one warns, and warnings are for all threads."""
    planner.set_up_planner(state, writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(True)
    plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    (plan,) = writer.prepare_global_plan(plans)
    writer.finish(metadata, [writer.write_data(planner.finish_plan(plan), planner).wait()])


def _index(chunk: Chunk) -> MetadataIndex:
    return MetadataIndex(chunk.key, chunk.start)


def _item(index: MetadataIndex, chunk: Chunk) -> WriteItem:
    box = ChunkStorageMetadata(torch.Size(chunk.start), torch.Size(chunk.size))
    data = TensorWriteData(box, TensorProperties(dtype=chunk.dtype), torch.Size(chunk.shape))
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)


def _whole(data: TensorWriteData) -> Whole:
    return Whole(tuple(data.size), data.properties.dtype)


def _data(item: WriteItem) -> TensorWriteData:
    assert item.tensor_data is not None
    return item.tensor_data

"""The mesh: how ranks lie on its axes, that one process needs no process group, and what its errors say."""

import dataclasses
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tests.distributed import Ranks
from tpformer import Axis, Mesh, ParallelConfig
from tpformer.mesh import Overlap, divide


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a plain `python script.py`."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("config", "world_size", "sizes"),
    [
        (ParallelConfig(), 1, (1, 1, 1)),
        (ParallelConfig(), 8, (1, 8, 1)),
        (ParallelConfig(tp=2), 8, (1, 4, 2)),
        (ParallelConfig(tp=2, pp=4), 8, (4, 1, 2)),
        (ParallelConfig(tp=2, pp=2, dp=3), 12, (2, 3, 2)),
    ],
)
def test_dp_fills_what_tp_and_pp_leave(config: ParallelConfig, world_size: int, sizes: tuple[int, int, int]) -> None:
    assert config.sizes(world_size) == sizes


@pytest.mark.parametrize(
    ("config", "world_size", "message"),
    [
        (ParallelConfig(tp=4), 2, r"tp \(4\) x pp \(1\) x dp \(1\) needs 4 processes, but 2 are running"),
        (ParallelConfig(tp=2), 1, r"tp \(2\) x pp \(1\) x dp \(1\) needs 2 processes, but 1 is running"),
        (ParallelConfig(tp=2, pp=2), 6, r"tp \(2\) x pp \(2\) x dp \(1\) needs 4 processes, but 6 are running"),
        (ParallelConfig(tp=2, dp=2), 8, r"dp \(2\) needs 4 processes, but 8 are running.* --nproc-per-node 4,"),
    ],
)
def test_degrees_that_do_not_match_the_processes(config: ParallelConfig, world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.sizes(world_size)


@pytest.mark.parametrize("name", ["tp", "pp", "dp"])
@pytest.mark.parametrize("degree", [0, -2])
def test_degrees_below_one_are_named(name: str, degree: int) -> None:
    with pytest.raises(ValueError, match=rf"{name} \({degree}\) must be at least 1"):
        ParallelConfig(**{name: degree})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"{name} \({degree}\) must be at least 1"):
        Mesh.create(**{name: degree})  # type: ignore[arg-type]


def test_an_unknown_overlap_is_named() -> None:
    expected = r"overlap \('fast'\) must be one of 'auto', 'symm_mem', 'chunked', 'off'"
    for make in (ParallelConfig, Mesh, Mesh.create):
        with pytest.raises(ValueError, match=expected):
            make(overlap="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("overlap", ["symm_mem", "chunked"])
def test_an_overlap_needs_something_to_overlap(overlap: Overlap) -> None:
    for make in (ParallelConfig, Mesh.create):
        with pytest.raises(ValueError, match=rf"overlap \('{overlap}'\) needs sequence_parallel: without it"):
            make(overlap=overlap)
    assert ParallelConfig(sequence_parallel=True, overlap=overlap).overlap == overlap
    assert Mesh.create(sequence_parallel=True, overlap=overlap).overlap == overlap


def test_auto_and_off_need_nothing() -> None:
    assert ParallelConfig().overlap == Mesh().overlap == Mesh.create().overlap == "auto"
    assert ParallelConfig(overlap="off").overlap == Mesh(overlap="off").overlap == Mesh.create(overlap="off").overlap
    with pytest.raises(TypeError):
        ParallelConfig(1, 1, 1, True, "off")  # type: ignore[call-arg]


def overlaps() -> tuple[str, str, str]:
    """Asked for, left out, and refused."""
    dist.barrier()
    try:
        Mesh.create(tp=2, overlap="chunked")
    except ValueError as error:
        asked = Mesh.create(tp=2, sequence_parallel=True, overlap="chunked").overlap
        return asked, Mesh.create(tp=2).overlap, str(error)
    return "", "", ""


def test_every_rank_has_the_overlap_that_was_asked_for(ranks: Ranks) -> None:
    for asked, default, message in ranks(overlaps, 4):
        assert (asked, default) == ("chunked", "auto")
        assert message.startswith("overlap ('chunked') needs sequence_parallel")


def test_a_mesh_of_one_process_has_no_process_group() -> None:
    for mesh in (Mesh(), Mesh.create(), Mesh.create(tp=1, pp=1, dp=1, device="cpu")):
        for name in ("pp", "dp", "tp", "world"):
            assert getattr(mesh, name) == Axis(name, 1, 0, None)
        assert mesh.device == torch.device("cpu")
        assert mesh.device_mesh is None
        assert not mesh.sequence_parallel
        mesh.close()
    assert not dist.is_initialized()
    assert Mesh.create(sequence_parallel=True).sequence_parallel
    with pytest.raises(dataclasses.FrozenInstanceError):
        Mesh().tp = Axis("tp")  # type: ignore[misc]


def test_one_process_cannot_be_two() -> None:
    with pytest.raises(ValueError, match="needs 2 processes, but 1 is running: start them with torchrun"):
        Mesh.create(tp=2)
    assert not dist.is_initialized()


def test_the_launcher_s_world_is_checked_before_any_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    """No MASTER_ADDR is set: joining a group would fail with another error."""
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match=r"tp \(4\) x pp \(1\) x dp \(1\) needs 4 processes, but 6 are running"):
        Mesh.create(tp=4)


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:1", "mps"):
        with pytest.raises(ValueError, match=rf"device '{name}' was asked for, but torch sees no GPU here"):
            Mesh.create(device=name)
    assert Mesh.create().device.type == "cpu"


def test_more_processes_than_gpus_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"local rank 2 needs 3 GPUs, but this machine has 2: start fewer"):
        Mesh.create()
    assert chosen == []
    assert Mesh.create(device="cpu").device.type == "cpu"  # an explicit CPU is respected
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Mesh.create().device == torch.device("cuda", 1)
    assert chosen == [1]


def describe(tp: int, pp: int, dp: int | None) -> dict[str, tuple[int, int, list[int]]]:
    """Size, rank and members of each axis of this process."""
    mesh = Mesh.create(tp=tp, pp=pp, dp=dp)
    axes = {name: getattr(mesh, name) for name in ("pp", "dp", "tp", "world")}
    dist.barrier()  # a rank that left at once would break the connections that its peers still make
    return {name: (axis.size, axis.rank, dist.get_process_group_ranks(axis.group)) for name, axis in axes.items()}


def test_tp_is_innermost(ranks: Ranks) -> None:
    """Neighbouring ranks, which share a machine, share the layers."""
    everyone = [0, 1, 2, 3]
    for rank, axes in enumerate(ranks(describe, 4, 2, 1, None)):
        outer, inner = divmod(rank, 2)
        assert axes["tp"] == (2, inner, [2 * outer, 2 * outer + 1])
        assert axes["dp"] == (2, outer, [inner, inner + 2])
        assert axes["pp"] == (1, 0, [rank])
        assert axes["world"] == (4, rank, everyone)
    for rank, axes in enumerate(ranks(describe, 4, 1, 2, 2)):  # pp is outermost
        outer, inner = divmod(rank, 2)
        assert axes["dp"] == (2, inner, [2 * outer, 2 * outer + 1])
        assert axes["pp"] == (2, outer, [inner, inner + 2])
    for rank, axes in enumerate(ranks(describe, 4, 4, 1, None)):
        assert axes["tp"] == (4, rank, everyone)
        assert axes["dp"] == axes["pp"] == (1, 0, [rank])


def test_a_launched_group_of_one(ranks: Ranks) -> None:
    """torchrun with one process: the axes have groups, of one."""
    (axes,) = ranks(describe, 1, 1, 1, None)
    assert set(map(str, axes.values())) == {str((1, 0, [0]))}


def refuse() -> tuple[str, bool]:
    dist.barrier()
    try:
        Mesh.create(tp=3)
    except ValueError as error:
        return str(error), dist.is_initialized()
    return "", False


def test_every_rank_refuses_degrees_that_do_not_fit(ranks: Ranks) -> None:
    for message, still_there in ranks(refuse, 4):
        assert message.startswith("tp (3) x pp (1) x dp (1) needs 3 processes, but 4 are running")
        assert still_there


def groups(processes_of_node: int, config: ParallelConfig) -> tuple[int, int] | str:
    """The sizes of dp_replicate and dp_shard, or what is wrong, where so many processes share a machine."""
    dist.barrier()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="error"):
        patch.setenv("LOCAL_WORLD_SIZE", str(processes_of_node))
        try:
            mesh = Mesh.of(config, "cpu")
        except ValueError as error:
            return str(error)
    dist.barrier()
    assert dist.get_process_group_ranks(mesh.dp.group) == [
        rank
        for rank in range(4)
        if (rank // mesh.tp.size) // mesh.dp.size == mesh.pp.rank and rank % mesh.tp.size == mesh.tp.rank
    ]
    return mesh.dp_replicate.size, mesh.dp_shard.size


@pytest.mark.parametrize(
    ("processes_of_node", "options", "expected"),
    [
        (2, {}, (2, 2)),
        (4, {}, (1, 4)),
        (4, {"pp": 2}, (1, 2)),  # the node has both stages, and of each all replicas
        (2, {"tp": 2}, (2, 1)),
        (1, {"tp": 2}, "dp_mode hsdp: a node's 1 processes have no whole replica of tp (2); give dp_shard"),
        (1, {"tp": 2, "dp_shard": 2}, (1, 2)),
        (4, {"dp_shard": 3}, "dp (4) must be divisible by dp_shard (3)"),
    ],
)
def test_hsdp_takes_the_replicas_of_a_node(
    processes_of_node: int, options: dict[str, int], expected: tuple[int, int] | str, ranks: Ranks
) -> None:
    config = ParallelConfig(dp_mode="hsdp", **options)  # type: ignore[arg-type]
    assert ranks(groups, 4, processes_of_node, config) == [expected] * 4


def close() -> bool:
    mesh = Mesh.create(tp=2)
    dist.barrier()
    mesh.close()
    mesh.close()  # again is no error
    return dist.is_initialized()


def test_close_leaves_the_group(ranks: Ranks) -> None:
    assert ranks(close, 2) == [False, False]


def test_divide() -> None:
    assert divide(12, 4, "heads") == 3
    with pytest.raises(ValueError, match=r"^heads \(10\) must be divisible by tp \(4\)$"):
        divide(10, 4, "heads")
    with pytest.raises(ValueError, match=r"^heads \(10\) must be divisible by kv_heads \(3\)$"):
        divide(10, 3, "heads", "kv_heads")


@pytest.mark.parametrize("make", [lambda: Mesh.create(), lambda: Mesh()], ids=["create", "Mesh()"])
def test_meshes_of_one_process_are_equal_values(make: Callable[[], Mesh]) -> None:
    assert make() == Mesh()
    assert hash(make()) == hash(Mesh())

"""On a GPU: torch's fused operators as they are, and NCCL's stream beside that of the matmuls, in a group of one.

What is multiplied is written late, after the GPU has slept: a stream that did not wait would read what was there.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.layers.prove import difference, noise
from tpformer import Axis, Mesh, overlap, symmetric_memory
from tpformer.collectives import Pending, _all_gather
from tpformer.overlap import chunk_lengths

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
B, S, D, F = 2, 512, 192, 320


@pytest.fixture
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """One NCCL rank."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    mesh = Mesh.create(tp=1, sequence_parallel=True)
    yield mesh
    mesh.close()


def late(x: Tensor) -> Tensor:
    """x on the GPU, which is NaN until the current stream has slept."""
    values = x.float().cuda()
    there = torch.full_like(values, torch.nan)
    torch.cuda.synchronize()
    torch.cuda._sleep(50_000_000)
    return there.copy_(values)


def always_gather(x: Tensor, axis: Axis) -> Pending:
    """start_gather_stack, which sends nothing at tp 1, made to."""
    stacked = x.new_empty(1, *x.shape)
    return Pending(_all_gather(stacked, x, axis), stacked)


def check(whole: Tensor, products: list[Tensor], scattered: Tensor) -> None:
    x, w, v = noise("x", B, S, D), noise("w", D, F), noise("v", D, F)
    assert torch.equal(whole.cpu(), x.float())
    pairs = [(products[0], x @ w), (products[1], x @ v), (scattered, x @ v)]
    assert max(difference(found.double().cpu().numpy(), right) for found, right in pairs) <= 1e-5


@pytest.mark.parametrize("most_chunks", [1, 4])
def test_chunks_wait_for_what_they_multiply(mesh: Mesh, most_chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "start_gather_stack", always_gather)
    monkeypatch.setattr(overlap, "MOST_CHUNKS", most_chunks)
    lengths = chunk_lengths(B, S, 1)
    assert len(lengths) == most_chunks
    w, v = (noise(name, D, F).float().cuda() for name in "wv")
    gathered = overlap._chunked_gather_matmul(late(noise("x", B, S, D)), [w, v.t().contiguous().t()], mesh.tp, lengths)
    scattered = overlap._chunked_matmul_scatter(late(noise("x", B, S, D)), v, mesh.tp, lengths)
    junk = [torch.full((B, S, F), torch.nan, device="cuda") for _ in range(8)]  # in memory that was freed too early
    check(*gathered, scattered)
    assert len(junk) == 8


def test_the_fused_operators_are_there_and_right(mesh: Mesh) -> None:
    assert mesh.tp.group is not None
    lacking = symmetric_memory.missing(mesh.tp.group, mesh.device)
    assert lacking == ""
    w, v = (noise(name, D, F).float().cuda() for name in "wv")
    gathered = overlap._fused_gather_matmul(late(noise("x", B, S, D)), [w, v.t().contiguous().t()], mesh.tp)
    scattered = overlap._fused_matmul_scatter(late(noise("x", B, S, D)), v, mesh.tp)
    check(*gathered, scattered)

"""What each rank communicates in a step, call by call and byte by byte; at tp 1 nothing at all.

A block is 1 all-reduce forward and 1 backward; the embedding 1 forward, the head 1 backward, and the loss gathers
three numbers a token for each chunk of tokens. Under sequence parallelism each all-reduce becomes an all-gather and a
reduce-scatter; and because a column-parallel layer keeps its (b, s/tp, d) input rather than the gathered one (that is
what the memory saving consists of), backward gathers the input of each once more to compute the weight's gradient. The
head is the exception: the loss computes its gradients in forward, while the gathered input is there.
"""

from collections import Counter
from collections.abc import Callable

import pytest
import torch

import tpformer
from tests.distributed import Ranks
from tests.proofs.cases import VARIANTS, Config, Layout, build, gpt, llama, random_batch
from tpformer import MLP, GatedMLP, Mesh, SelfAttention
from tpformer.trace import Trace

Ledger = Counter[tuple[str, str, str, int]]
"""How many calls of (op, phase, source file, bytes), all of them on the axis tp."""

MODELS: dict[str, Config] = {
    "gpt": gpt(),
    "gpt-untied": gpt(tie_embeddings=False),
    "llama": llama(),
    "llama-kv1": llama(num_kv_heads=1),
}
B, S, D, L = 4, 8, 32, 2  # of random_batch, gpt() and llama()
SIZE = {torch.float32: 4, torch.float64: 8}
TP_LAYOUTS = [Layout(tp, 1, sp) for tp in (2, 4) for sp in (False, True)] + [Layout(2, 2, True)]


def ledger(trace: Trace) -> Ledger:
    """The trace's calls, counted; each must be on tp."""
    assert {call.axis for call in trace.calls} <= {"tp"}
    return Counter((call.op, call.phase, call.site.split(":")[0].split("/")[1], call.bytes) for call in trace.calls)


def step(name: str, layout: Layout) -> list[Ledger]:
    """On a rank: the ledger of one forward and backward, in each dtype of SIZE."""
    ledgers = []
    for dtype in SIZE:
        model = build(MODELS[name], layout.mesh()).to(dtype)
        tokens, targets = random_batch(101)
        with tpformer.trace_communication() as trace:
            model.loss(tokens, targets).backward()
        ledgers.append(ledger(trace))
    return ledgers


def expected_step(layout: Layout, size: int) -> Ledger:
    """What a model of L layers must communicate, `size` being the bytes of one number."""
    whole = B * S * D * size
    head = "linear_cross_entropy.py"
    loss = ("all_gather", "forward", head, layout.tp * 3 * B * S * size)
    if not layout.sequence_parallel:
        return Counter(
            {
                loss: 1,
                ("all_reduce", "forward", "embedding.py", whole): 1,
                ("all_reduce", "forward", "linear.py", whole): 2 * L,  # out and down of each layer
                ("all_reduce", "backward", "linear.py", whole): 2 * L,  # qkv and up of each layer
                ("all_reduce", "backward", head, whole): 1,
            }
        )
    return Counter(
        {
            loss: 1,
            ("reduce_scatter", "forward", "embedding.py", whole): 1,
            ("all_gather", "forward", "linear.py", whole): 2 * L,  # the inputs of qkv and up
            ("all_gather", "forward", head, whole): 1,  # the input of the head
            ("reduce_scatter", "forward", "linear.py", whole): 2 * L,  # out and down
            # the gradients of out and down; and once more the inputs of qkv and up
            ("all_gather", "backward", "linear.py", whole): 2 * L + 2 * L,
            ("reduce_scatter", "backward", "linear.py", whole): 2 * L,  # qkv and up
            ("reduce_scatter", "backward", head, whole): 1,
            ("all_gather", "backward", "embedding.py", whole): 1,
        }
    )


@pytest.mark.parametrize("layout", TP_LAYOUTS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_communicates_this_and_nothing_else(name: str, layout: Layout, ranks: Ranks) -> None:
    for found in ranks(step, layout.world_size, name, layout):
        assert found == [expected_step(layout, size) for size in SIZE.values()]


@pytest.mark.parametrize("name", MODELS)
def test_one_rank_does_not_communicate(name: str, ranks: Ranks) -> None:
    for layout in (Layout(1), Layout(1, 1, True), Layout(1, 2)):
        for found in ranks(step, layout.world_size, name, layout):
            assert found == [Counter(), Counter()]


BLOCKS: dict[str, Callable[[Mesh], torch.nn.Module]] = {
    "attention": lambda mesh: SelfAttention(llama(num_kv_heads=2, qk_norm=True).attention, mesh=mesh),
    "attention with bias": lambda mesh: SelfAttention(gpt().attention, mesh=mesh),
    "mlp": lambda mesh: MLP(D, 48, mesh=mesh),
    "gated mlp": lambda mesh: GatedMLP(D, 48, mesh=mesh),
}


def block_step(name: str, layout: Layout) -> Counter[tuple[str, str]]:
    """On a rank: op and phase of each call of one block's forward and backward."""
    mesh = layout.mesh()
    x = torch.randn(B, S // layout.tp if layout.sequence_parallel else S, D, requires_grad=True)
    with tpformer.trace_communication() as trace:
        y = BLOCKS[name](mesh)(x)
        y.backward(torch.randn_like(y))
    return Counter((call.op, call.phase) for call in trace.calls)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_one_all_reduce_each_way_or_a_pair(name: str, tp: int, ranks: Ranks) -> None:
    for found in ranks(block_step, tp, name, Layout(tp)):
        assert found == {("all_reduce", "forward"): 1, ("all_reduce", "backward"): 1}
    pair = {("all_gather", "forward"): 1, ("reduce_scatter", "forward"): 1}
    pair |= {("all_gather", "backward"): 2, ("reduce_scatter", "backward"): 1}  # one of the two gathers x again
    for found in ranks(block_step, tp, name, Layout(tp, 1, True)):
        assert found == pair


def partial_sums(variant: str, layout: Layout) -> list[tuple[str, str, str, int]]:
    """On a rank: op, axis, dtype and bytes of each call of reduce_partial_gradients, of a bf16 and an fp64 model."""
    calls = []
    for dtype in (torch.bfloat16, torch.float64):
        model = build(VARIANTS[variant], layout.mesh()).to(dtype)
        model.loss(*random_batch(VARIANTS[variant].vocab_size)).backward()
        with tpformer.trace_communication() as trace:
            tpformer.reduce_partial_gradients(model)
        calls += [(call.op, call.axis, call.dtype, call.bytes) for call in trace.calls]
    return calls


NORMS = {"gpt": (4 * L + 2) * D, "llama": (2 * L + 1) * D}  # numbers in all norms: GPT's have biases
PARTIAL: list[tuple[str, Layout, int]] = [
    ("gpt-tied", Layout(4), 0),
    ("llama-heads-untied", Layout(2), 0),
    ("qwen2-kv2-bias-tied", Layout(2), 0),
    # under sequence parallelism: norms, and in a GPT the biases of out and down and the table of 12 positions
    ("gpt-tied", Layout(2, 1, True), NORMS["gpt"] + L * 2 * D + 12 * D),
    ("llama-heads-untied", Layout(4, 1, True), NORMS["llama"]),
    # the norms of queries and keys, each one head wide
    ("qwen3-kv4-wide-heads", Layout(4), L * 2 * 12),
    ("qwen3-kv4-wide-heads", Layout(4, 1, True), L * 2 * 12 + NORMS["llama"]),
    # copied key and value rows with their biases: each KV head has a slot of its own
    ("qwen2-kv2-bias-tied", Layout(4), L * 2 * 2 * (8 * D + 8)),
    ("qwen2-kv1-bias", Layout(2, 1, True), L * 2 * (8 * D + 8) + NORMS["llama"]),
]


@pytest.mark.parametrize(("variant", "layout", "numbers"), PARTIAL, ids=str)
def test_partial_gradients_take_one_all_reduce_or_none(
    variant: str, layout: Layout, numbers: int, ranks: Ranks
) -> None:
    """In fp32 for a bf16 model, in fp64 for an fp64 one."""
    one_each = [("all_reduce", "tp", "float32", 4 * numbers), ("all_reduce", "tp", "float64", 8 * numbers)]
    for found in ranks(partial_sums, layout.world_size, variant, layout):
        assert found == (one_each if numbers else [])

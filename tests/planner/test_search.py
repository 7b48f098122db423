"""What is searched, what is dropped, in which order it comes, and how long that takes."""

import itertools
import math
import time
from typing import Any

import pytest

import tpformer
from tpformer import LlamaConfig, ParallelConfig
from tpformer.planner.candidate import Candidate
from tpformer.planner.cost import Machine
from tpformer.planner.hardware import device, link
from tpformer.planner.known_models import known_model
from tpformer.planner.search import RESERVED, Search, layouts, planned, run, worst_memory

H100 = Machine(device("h100-sxm"), link("ib-400"))


def search(model: str = "llama-8b", gpus: int = 16, tokens: int = 2**20, **options: Any) -> Search:
    return Search(known_model(model), gpus, H100, tokens, 8192, **options)


def test_every_layout_that_is_found_fits_and_none_is_faster_than_the_one_before() -> None:
    plans = run(search())
    room = H100.device.memory * (1 - RESERVED)
    assert len(plans) > 50
    assert all(found.memory.total <= room for found in plans)
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(plans))
    assert all(found.candidate.world_size == 16 for found in plans)
    assert len({(found.candidate.parallel, found.candidate.micro_batch_size) for found in plans}) == len(plans)


def test_no_layout_is_forgotten() -> None:
    """Against every combination of the options, tried one by one: the best one is found, and it is the best."""
    asked = search(gpus=8, tokens=2**19)
    best = run(asked)[0]
    room = H100.device.memory * (1 - RESERVED)
    every = []
    for options in layouts(asked):
        for recompute in ("none", "full"):
            for size in (1, 2, 4, 8, 16, 32, 64):
                parallel = ParallelConfig(precision="bf16", recompute=recompute, **options)
                try:
                    candidate = Candidate(asked.model, parallel, 8192, asked.batch_size, size)
                    if worst_memory(candidate).total <= room:
                        every.append(planned(candidate, H100).seconds)
                except ValueError:
                    continue
    assert best.seconds == pytest.approx(min(every))


def test_recomputation_is_tried_where_it_makes_something_fit() -> None:
    """And not where the same micro-batch fits without."""
    plans = run(search("llama-70b", 32, 2**20))
    seen = [(f.candidate.parallel, f.candidate.micro_batch_size) for f in plans]
    assert any(parallel.recompute == "full" for parallel, _ in seen)
    bare = {
        (p.tp, p.pp, p.dp_mode, p.pp_schedule, p.stages_per_rank, p.sequence_parallel, p.dp_shard, n)
        for p, n in seen
        if p.recompute == "none"
    }
    again = {
        (p.tp, p.pp, p.dp_mode, p.pp_schedule, p.stages_per_rank, p.sequence_parallel, p.dp_shard, n)
        for p, n in seen
        if p.recompute != "none"
    }
    assert not bare & again


def test_tp_stays_within_a_node_and_divides() -> None:
    assert {options["tp"] for options in layouts(search(gpus=64))} == {1, 2, 4, 8}
    odd = LlamaConfig(num_heads=24, hidden_size=3072, num_kv_heads=6, ffn_hidden_size=8192, max_seq_len=8192)
    found = run(Search(odd, 8, H100, 2**18, 8192))
    assert {f.candidate.parallel.tp for f in found} == {
        1,
        2,
    }  # 6 key-value heads: 4 and 8 neither divide nor are divided


def test_what_a_run_would_refuse_is_not_planned() -> None:
    """Both ends of a tied model on one process, shared out: as parallel/fsdp.py says."""
    found = run(search("llama-1b", 16, 2**20))
    shared = [f for f in found if f.candidate.parallel.pp_schedule == "zbv" and f.candidate.parallel.pp > 1]
    assert shared and all(f.candidate.parallel.dp_mode == "replicate" for f in shared)
    with pytest.raises(ValueError, match=r"pp_schedule \(zbv\) and dp_mode \(zero2\) cannot with tie_embeddings"):
        options: Any = {"pp": 2, "dp": 2, "pp_schedule": "zbv", "dp_mode": "zero2"}
        Candidate(known_model("llama-1b"), ParallelConfig(**options), 4096, 16, 1)


def test_what_does_not_fit_is_an_error_with_the_smallest() -> None:
    with pytest.raises(
        ValueError, match=r"nothing fits on 2 x h100-sxm .*: the smallest found, tp .* needs \d+\.\d GiB"
    ):
        run(search("llama-405b", 2))
    with pytest.raises(ValueError, match="no layout divides on 7 x"):
        run(Search(known_model("llama-8b"), 7, H100, 8192, 8192))


def test_sixteen_thousand_devices_in_under_two_seconds() -> None:
    """Of processor time: other tests may run beside."""
    start = time.process_time()
    plans = tpformer.plan("llama-405b", 16384, "h100-sxm", 16 * 2**20)
    assert time.process_time() - start < 2.0
    assert plans[0].candidate.world_size == 16384


def test_a_calibrated_machine_is_a_device(tmp_path: Any) -> None:
    path = tmp_path / "machine.json"
    path.write_text(device("cpu").to_json())
    model = LlamaConfig(
        vocab_size=256, hidden_size=256, num_layers=4, num_heads=4, ffn_hidden_size=512, max_seq_len=256
    )
    found = tpformer.plan(model, 2, str(path), 2048, network="loopback", precision="fp32")
    assert found[0].candidate.on_cpu
    assert math.isfinite(found[0].seconds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("llama-9b", 8, "h100-sxm", 2**20), "model 'llama-9b' is not known"),
        (("llama-8b", 8, "h100", 2**20), r"device \('h100'\) must be one of"),
        (("llama-8b", 8, "v100-sxm2-32", 2**20), "has no bf16 matmul rate"),
    ],
)
def test_unknown_names_are_errors(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tpformer.plan(*arguments)

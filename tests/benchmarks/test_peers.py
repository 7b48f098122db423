"""The benchmark's peers are the model they claim to be: Hugging Face's Llama, whole or cut by DTensor."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from einops import rearrange
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.peers import dtensor
from benchmarks.peers.huggingface import HuggingFaceLlama, from_plain, liger_kernels
from benchmarks.peers.plain import PlainLlama, PlainLlamaConfig, load_from_tpformer

CONFIG = PlainLlamaConfig(
    vocab_size=256,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    ffn_hidden_size=96,
    max_seq_len=32,
)


def tiny_plain(seed: int = 0) -> PlainLlama:
    """A small plain Llama whose weights, norms included, are random and large enough for errors to show."""
    torch.manual_seed(seed)
    model = PlainLlama(CONFIG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model


def batch() -> tuple[Tensor, Tensor]:
    """Tokens and targets, each (2, 16)."""
    text = torch.randint(CONFIG.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def test_plain_is_hugging_faces_llama() -> None:
    pytest.importorskip("transformers")
    plain, theirs = tiny_plain(), HuggingFaceLlama(CONFIG)
    theirs.causal.load_state_dict(from_plain({name: p.detach() for name, p in plain.named_parameters()}))
    tokens, targets = batch()
    torch.testing.assert_close(plain(tokens), theirs.causal(tokens).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain.loss(tokens, targets), theirs.loss(tokens, targets), atol=1e-5, rtol=1e-5)


def test_liger_is_gone_outside_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    modeling_llama = pytest.importorskip("transformers.models.llama.modeling_llama")

    def apply() -> None:  # what apply_liger_kernel_to_llama does, as far as the context can see
        for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
            setattr(modeling_llama, name, None)
        modeling_llama.LlamaForCausalLM.forward = None

    liger = ModuleType("liger_kernel.transformers")
    monkeypatch.setattr(liger, "apply_liger_kernel_to_llama", apply, raising=False)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    before, forward = dict(vars(modeling_llama)), modeling_llama.LlamaForCausalLM.forward
    inside = liger_kernels()
    for _ in range(2):
        assert vars(modeling_llama) == before and modeling_llama.LlamaForCausalLM.forward is forward
        with inside():
            assert modeling_llama.apply_rotary_pos_emb is modeling_llama.LlamaMLP is None
            assert modeling_llama.LlamaForCausalLM.forward is None
    assert vars(modeling_llama) == before and modeling_llama.LlamaForCausalLM.forward is forward


def worker(rank: int, function: Callable[..., None], world_size: int, store: str, args: tuple[Any, ...]) -> None:
    """One rank of a gloo job."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    function(*args)
    dist.destroy_process_group()


def whole_gradients(model: PlainLlama) -> dict[str, Tensor]:
    """Every gradient there is, gathered if it is cut."""
    named = model.named_parameters()
    return {name: dtensor.whole(p.grad) for name, p in named if p.grad is not None}


def compare_dtensor_with_plain(tp: int) -> None:
    """On each rank: the same loss and the same gradients, whole, as one process gives."""
    tokens, targets = batch()
    plain = tiny_plain()
    loss = plain.loss(tokens, targets)
    loss.backward()
    mesh = dtensor.one_axis_mesh(torch.device("cpu"), tp)
    cut = dtensor.parallelize(tiny_plain(), mesh)
    cut_loss = dtensor.forward_backward(cut, tokens, targets)
    torch.testing.assert_close(cut_loss, loss.detach(), atol=1e-5, rtol=1e-5)
    expected, actual = whole_gradients(plain), whole_gradients(cut)
    assert len(expected) == len(list(plain.parameters()))
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-4)
    down = cut.get_parameter("blocks.0.mlp.down.weight")
    assert isinstance(down, DTensor) and down.to_local().shape == (64, 96 // tp)


@pytest.mark.parametrize("tp", [1, 2])
def test_dtensor_is_the_plain_model(tp: int, tmp_path: Path) -> None:
    mp.spawn(worker, (compare_dtensor_with_plain, tp, str(tmp_path / "store"), (tp,)), nprocs=tp)


def tpformer_weights(model: PlainLlama) -> dict[str, Tensor]:
    """A plain model's weights in tpformer's fused layout, packed row by row."""
    fused = ("q", "k", "v", "gate", "up")
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    full = {name: tensor for name, tensor in named.items() if name.split(".")[-2] not in fused}
    for index in range(CONFIG.num_layers):
        prefix = f"blocks.{index}"
        q, k, v = (rearrange(named[f"{prefix}.attention.{x}.weight"], "(h e) d -> h e d", e=16) for x in "qkv")
        gate, up = named[f"{prefix}.mlp.gate.weight"], named[f"{prefix}.mlp.up.weight"]
        full[f"{prefix}.attention.qkv.weight"] = torch.cat([q[0], q[1], k[0], v[0], q[2], q[3], k[1], v[1]])
        full[f"{prefix}.mlp.gate_up.weight"] = torch.stack((gate, up), dim=1).flatten(0, 1)
    return full


def test_fused_weights_are_unpacked() -> None:
    source, target = tiny_plain(seed=0), tiny_plain(seed=1)
    load_from_tpformer(target, tpformer_weights(source))
    for name, parameter in target.named_parameters():
        assert torch.equal(parameter, source.get_parameter(name)), name


def test_tpformer_is_the_plain_model() -> None:
    tpformer = pytest.importorskip("tpformer")
    model = tpformer.Llama(tpformer.LlamaConfig(**vars(CONFIG)), tpformer.Mesh(), seed=0)
    full = {name: tpformer.full_parameter(model, name).detach() for name, _ in model.named_parameters()}
    plain = PlainLlama(CONFIG)
    load_from_tpformer(plain, full)
    torch.testing.assert_close(model.loss(*batch()), plain.loss(*batch()), atol=1e-5, rtol=1e-5)

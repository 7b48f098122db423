"""A model of transformers, split by a plan over the processes there are: the same loss, step by step, on any number.

python examples/parallelize_transformers.py
torchrun --nproc-per-node 2 examples/parallelize_transformers.py
"""

import os

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tpformer
from tpformer import Mesh

PLAN: dict[str, tpformer.Style] = {
    "*.self_attn.[qkv]_proj": "column",
    "*.self_attn.o_proj": "row",
    "*.mlp.gate_proj": "column",
    "*.mlp.up_proj": "column",
    "*.mlp.down_proj": "row",
    "model.embed_tokens": "vocab",
    "lm_head": "vocab",
}


def main() -> None:
    """Train a few steps, and show what each rank holds and what was communicated."""
    mesh = Mesh.create(tp=int(os.environ.get("WORLD_SIZE", "1")))
    torch.manual_seed(0)  # the same on every rank, so that they split the same weights
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config).to(mesh.device)
    tokens = torch.arange(64, device=mesh.device).view(2, 32) * 7 % 1000
    tpformer.parallelize(model, PLAN, mesh, check=lambda llama: llama(tokens).logits)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    for step in range(5):
        with tpformer.trace_communication() as trace:
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            tpformer.reduce_partial_gradients(model)  # does something if the plan says partial only
        optimizer.step()
        optimizer.zero_grad()
        if mesh.tp.rank == 0:
            print(f"step {step}  loss {loss.item():.6f}")

    if mesh.tp.rank == 0:
        whole = sum(torch.Size(p.shape).numel() for p in tpformer.placements(model, mesh).values())
        print(f"\n{sum(p.numel() for p in model.parameters()):,} parameters on each of {mesh.tp.size} ranks")
        print(f"{whole:,} in the whole model\n\ncommunication of one step\n{trace.table()}")
    mesh.close()


if __name__ == "__main__":
    main()

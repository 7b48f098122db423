"""A model of your own from the parallel layers: run it alone, or on several processes, and see the same loss.

python examples/build_a_model.py
torchrun --nproc-per-node 2 examples/build_a_model.py
"""

import os

import torch
from torch import Tensor, nn

import tpformer
from tpformer import ColumnParallelLinear, Mesh, RMSNorm, RowParallelLinear, VocabParallelEmbedding, VocabParallelHead


class Block(nn.Module):
    """A feed-forward block: nn.Linear became ColumnParallelLinear and RowParallelLinear, nothing else changed."""

    def __init__(self, dim: int, mesh: Mesh):
        super().__init__()
        self.norm = RMSNorm(dim, mesh=mesh)
        self.up = ColumnParallelLinear(dim, 4 * dim, mesh=mesh)
        self.down = RowParallelLinear(4 * dim, dim, mesh=mesh)

    def forward(self, x: Tensor) -> Tensor:
        """(b, s, d) -> (b, s, d); between up and down each rank has (b, s, 4d/tp)."""
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    """Predicts the next token from the one before it."""

    def __init__(self, vocab_size: int, dim: int, num_blocks: int, mesh: Mesh):
        super().__init__()
        self.mesh, self.vocab_size = mesh, vocab_size
        self.embedding = VocabParallelEmbedding(vocab_size, dim, mesh=mesh)
        self.blocks = nn.Sequential(*(Block(dim, mesh) for _ in range(num_blocks)))
        self.head = VocabParallelHead(dim, vocab_size, mesh=mesh)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean nats per token; no rank ever has the whole logits."""
        logits = self.head(self.blocks(self.embedding(tokens)))  # (b, s, padded_vocab/tp)
        return tpformer.vocab_parallel_cross_entropy(logits, targets, self.mesh, vocab_size=self.vocab_size)


def main() -> None:
    """Train a few steps and show what each rank holds and what was communicated."""
    mesh = Mesh.create(tp=int(os.environ.get("WORLD_SIZE", "1")))
    torch.manual_seed(0)  # the same on every rank: each draws its own part of the same weights
    model = Model(vocab_size=1000, dim=64, num_blocks=2, mesh=mesh).to(mesh.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.arange(64, device=mesh.device).view(2, 32)
    targets = (tokens * 7 + 3) % 1000

    for step in range(5):
        with tpformer.trace_communication() as trace:
            loss = model.loss(tokens, targets)
            loss.backward()
            tpformer.reduce_partial_gradients(model)  # does something under sequence parallelism only
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

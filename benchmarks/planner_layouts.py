"""The layouts whose step times on a CPU are predicted and measured: one model, one batch, one to four processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tpformer import LlamaConfig, ParallelConfig

MODEL = LlamaConfig(
    vocab_size=8192,
    hidden_size=512,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    ffn_hidden_size=1408,
    max_seq_len=256,
)
SEQ_LEN, BATCH = 256, 8


@dataclass(frozen=True)
class Case:
    """A layout of the model."""

    parallel: ParallelConfig
    micro_batch_size: int

    @property
    def processes(self) -> int:
        """How many it takes."""
        p = self.parallel
        return p.tp * p.pp * (p.dp or 1)

    @property
    def name(self) -> str:
        """For tables."""
        p = self.parallel
        parts = [f"{axis} {getattr(p, axis)}" for axis in ("tp", "pp", "dp") if getattr(p, axis) > 1]
        parts += ["sp"] * p.sequence_parallel + [p.pp_schedule] * (p.pp > 1)
        parts += [p.dp_mode] * (p.dp_mode != "replicate") + [f"recompute {p.recompute}"] * (p.recompute != "none")
        return ", ".join([*(parts or ["one process"]), f"micro-batch {self.micro_batch_size}"])


def cases(processes: int) -> list[Case]:
    """The layouts on so many processes. Raises ValueError for a number without layouts."""
    every: dict[int, list[tuple[dict[str, Any], int]]] = {
        1: [({}, 8), ({}, 2), ({"recompute": "full"}, 8)],
        2: [
            ({"tp": 2}, 8),
            ({"tp": 2, "sequence_parallel": True}, 8),
            ({"tp": 2, "recompute": "full"}, 8),
            ({"pp": 2, "pp_schedule": "gpipe"}, 4),
            ({"pp": 2, "pp_schedule": "1f1b"}, 1),
            ({"pp": 2, "pp_schedule": "interleaved_1f1b"}, 2),
            ({"dp": 2}, 4),
            ({"dp": 2, "dp_mode": "zero2"}, 4),
            ({"dp": 2, "dp_mode": "fsdp"}, 4),
        ],
        4: [({"tp": 4}, 8), ({"tp": 2, "pp": 2}, 2), ({"tp": 2, "dp": 2}, 4), ({"dp": 4}, 2), ({"pp": 4}, 1)],
    }
    if processes not in every:
        raise ValueError(f"there are layouts on {', '.join(map(str, every))} processes, not on {processes}")
    return [Case(ParallelConfig(**({"dp": 1} | options)), size) for options, size in every[processes]]

"""Bytes of model state a rank holds for each parameter of its tp-local part: plain numbers, no processes."""

from dataclasses import dataclass

from tpformer.parallel_config import ParallelConfig


@dataclass(frozen=True)
class StateBytes:
    """Bytes for each parameter of what a rank computes with (of its pipeline stages and its slice over tp).

    The whole of them, 16 to 20 bytes, is counted in section 3.1 of ZeRO (arXiv 1910.02054): there 16 in fp16, with
    gradients in fp16; here gradients are fp32, so that narrow precisions have 18.
    """

    weights: float
    """In fp32: what the optimizer updates."""
    moments: float
    """Adam's two, in fp32."""
    gradients: float
    """In fp32, when backward is through."""
    copy: float
    """What forward and backward read, if it is not `weights` itself: held from the first gather to backward's end."""
    gathered: float
    """The same, of the blocks that are gathered just now only: for each parameter of these and of the ends."""
    accumulated: float
    """fp32 sums of whole gradients that wait for a step's last micro-batch."""

    @property
    def held(self) -> float:
        """At most at any one time, without what is gathered just now."""
        return self.weights + self.moments + self.gradients + self.copy + self.accumulated

    @property
    def between_steps(self) -> float:
        """From the end of a step's backward to the next step's first gather; gradients go with the update."""
        return self.weights + self.moments + self.gradients


def state_bytes(config: ParallelConfig, shards: int, micro_batches: int = 1) -> StateBytes:
    """What each parameter takes where `shards` replicas share out what dp_mode says.

    replicate: fp32 4 + 8 + 4 = 16, bf16 and fp16 2 more for the copy. zero2: 16/shards and the copy, 4 or 2, for the
    length of a step. fsdp, hsdp: 16/shards; gathered blocks take 4 or 2 beside. In a pipeline these too keep the copy.
    With micro-batches, shared-out gradients add up whole, 4 bytes, before the last one's backward.
    """
    width = 4.0 if config.precision == "fp32" else 2.0
    if shards == 1 or config.dp_mode == "replicate":
        return StateBytes(4, 8, 4, 0 if width == 4 else width, 0, 0)
    kept = config.dp_mode == "zero2" or config.pp > 1
    return StateBytes(
        weights=4 / shards,
        moments=8 / shards,
        gradients=4 / shards,
        copy=width if kept else 0,
        gathered=0 if kept else width,
        accumulated=4 if micro_batches > 1 else 0,
    )

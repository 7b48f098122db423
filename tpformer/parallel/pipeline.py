"""Pipeline parallelism over torch.distributed.pipelining: torch runs the schedules, here are the stages and the glue.

Sources: GPipe (arXiv 1811.06965), 1F1B (1806.03377), interleaved 1F1B (2104.04473), zero bubble (2401.10241),
DualPipeV (2412.19437).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules

from tpformer.layers.cache import KVCache
from tpformer.mesh import Mesh
from tpformer.models.stage import DecoderStage
from tpformer.parallel.split import check_micro_batches, rank_of
from tpformer.parallel.timeline import Kind, Timeline, record
from tpformer.parallel_config import ParallelConfig
from tpformer.random import Key

_SCHEDULES: dict[str, Any] = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved_1f1b": schedules.ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}


@dataclass(frozen=True)
class MicroBatches:
    """What one replica's batch is cut into: `count` times int64 (size, seq_len); and the stages' activations' dtype."""

    count: int
    size: int
    seq_len: int
    dtype: torch.dtype = torch.float32


class Pipeline:
    """The stages of this process, and how they run together with the other processes' of the pp axis.

    stages: this process's, by number. gradients: told before each backward whether it is the stage's last.
    Raises ValueError for a number of micro-batches that the schedule cannot run.
    """

    def __init__(
        self,
        stages: dict[int, DecoderStage],
        mesh: Mesh,
        config: ParallelConfig,
        gradients: Any,
        batches: MicroBatches,
    ):
        check_micro_batches(config, batches.count)
        self.stages, self.mesh, self.batches = stages, mesh, batches
        self.config = next(iter(stages.values())).config
        self._layout = config
        self._factor = 1.0
        self._scheduled = [
            _ScheduledStage(stage, number, config.num_stages, gradients, batches) for number, stage in stages.items()
        ]
        single = config.pp_schedule in ("gpipe", "1f1b")
        self._schedule = _SCHEDULES[config.pp_schedule](
            self._scheduled[0] if single else self._scheduled,
            batches.count,
            loss_fn=lambda loss, _: loss * self._factor,
            scale_grads=False,
        )

    def backward(
        self,
        samples: Tensor,
        *,
        key: Key | None = None,
        z_loss: float = 0.0,
        scale: float = 1.0,
        timeline: Timeline | None = None,
    ) -> Tensor:
        """Forward and backward of all micro-batches of samples, int64 (n, s + 1); the gradient is of scale x mean loss.

        Returns the mean loss where the last stage is, 0 elsewhere.
        """
        size, count = self.batches.size, self.batches.count
        tokens, targets = samples[:, :-1].contiguous(), samples[:, 1:].contiguous()
        places = [None if key is None else Key(key.seed, key.sample + n * size) for n in range(count)]
        for stage in self._scheduled:
            stage.timeline = timeline
            stage.arguments = [{"key": place} for place in places]
            if stage.is_last:
                for arguments, part in zip(stage.arguments, targets.split(size), strict=True):
                    arguments |= {"targets": part, "z_loss": z_loss}
        self._factor = scale / count
        losses: list[Tensor] = []
        first, last = 0 in self.stages, self._layout.num_stages - 1 in self.stages
        self._schedule.step(
            *((tokens,) if first else ()), target=targets if last else None, losses=losses, return_outputs=False
        )
        return torch.stack([loss.detach() for loss in losses]).sum() / scale if last else _zero(self.mesh)

    def loss(self, tokens: Tensor, targets: Tensor, *, key: Key | None = None, z_loss: float = 0.0) -> Tensor:
        """Mean loss in nats per token of a batch of any size, one stage after another; the same on every rank."""
        result = self._relay(tokens, {"targets": targets, "z_loss": z_loss}, key)
        return self._from_last(result, (), torch.promote_types(self.batches.dtype, torch.float32))

    def full_logits(self, tokens: Tensor) -> Tensor:
        """int64 (b, s) -> the whole logits (b, s, vocab_size) on every rank; collective."""
        result = self._relay(tokens, {}, None)
        return self._from_last(result, (*tokens.shape, self.config.vocab_size), self.batches.dtype)

    def next_logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """int64 (b, s), which the cache was advanced by -> the logits after the last, (b, vocab_size), on every rank.

        Collective; a cache holds what the blocks of this process need. Not under sequence parallelism.
        """
        result = self._relay(tokens, {}, None, cache)
        return self._from_last(result, (len(tokens), self.config.vocab_size), self.batches.dtype)

    def modules(self) -> Iterator[nn.Module]:
        """All of this process's stages."""
        for stage in self.stages.values():
            yield from stage.modules()

    @torch.no_grad()
    def _relay(
        self, tokens: Tensor, at_last: dict[str, Any], key: Key | None, cache: KVCache | None = None
    ) -> Tensor | None:
        """What the last stage makes of it, where that is; None elsewhere."""
        x, before = tokens, -1
        split = self.mesh.sequence_parallel and cache is None
        length = tokens.shape[1] // (self.mesh.tp.size if split else 1)
        for number in range(self._layout.num_stages):
            here = rank_of(number, self._layout)
            if here == self.mesh.pp.rank:
                if before not in (-1, here):
                    x = torch.empty(len(tokens), length, self.config.hidden_size, **_like(self))
                    dist.recv(x, group=self.mesh.pp.group, group_src=before)
                last = number == self._layout.num_stages - 1
                x = self.stages[number](x, key=key, cache=cache, **(at_last if last else {}))
            elif before == self.mesh.pp.rank:
                dist.send(x.contiguous(), group=self.mesh.pp.group, group_dst=here)
            before = here
        return x if before == self.mesh.pp.rank else None

    def _from_last(self, result: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        x = (
            torch.empty(shape, dtype=dtype, device=self.mesh.device)
            if result is None
            else result.to(dtype).contiguous()
        )
        dist.broadcast(x, group=self.mesh.pp.group, group_src=rank_of(self._layout.num_stages - 1, self._layout))
        return x

    def sum_tied(self, gradients: dict[str, Tensor]) -> None:
        """Add up the gradients of the embedding on the first and the last stage, where it is tied, in place.

        The two exchange theirs, so that no process group of two is needed; both sums have the same bits.
        """
        name, mine = "embedding.weight", self.mesh.pp.rank
        first, last = 0, rank_of(self._layout.num_stages - 1, self._layout)
        if first == last or mine not in (first, last) or not self.config.tie_embeddings:
            return
        other, theirs = first + last - mine, torch.empty_like(gradients[name])
        group = self.mesh.pp.group
        sends = dist.P2POp(dist.isend, gradients[name].contiguous(), group=group, group_peer=other)
        receives = dist.P2POp(dist.irecv, theirs, group=group, group_peer=other)
        for work in dist.batch_isend_irecv([sends, receives]):
            work.wait()
        gradients[name].add_(theirs)


class _ScheduledStage(PipelineStage):
    """A stage under torch's schedules, which gives each micro-batch its own arguments and tells what it does."""

    def __init__(self, module: DecoderStage, number: int, count: int, gradients: Any, batches: MicroBatches):
        mesh = module.mesh
        shape = (batches.size, batches.seq_len)
        length = batches.seq_len // (mesh.tp.size if mesh.sequence_parallel else 1)
        # on the meta device: with the shapes known, no stage has to be run to find them out
        tokens = torch.empty(shape, dtype=torch.int64, device="meta")
        x = torch.empty(batches.size, length, module.config.hidden_size, dtype=batches.dtype, device="meta")
        x.requires_grad_()
        loss = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
        super().__init__(
            module,
            number,
            count,
            mesh.device,
            input_args=(tokens if module.part.first else x,),
            output_args=(loss if module.part.last else x,),
            group=mesh.pp.group,
            dw_builder=self._weight_gradients,
        )
        self.arguments: list[dict[str, Any]] = []
        self.timeline: Timeline | None = None
        self._gradients = gradients
        self._waiting: list[Callable[[], None]] = []

    def forward_one_chunk(
        self, fwd_chunk_id: int, args: Any, kwargs: Any = None, save_forward_output: bool = True
    ) -> Any:
        """torch's, with this micro-batch's own arguments."""
        with record(self.timeline, "forward", self.stage_index, fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, args, self.arguments[fwd_chunk_id], save_forward_output)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """torch's; if it is to leave the weights' gradients for later, those of linear layers wait."""
        kind: Kind = "backward" if full_backward else "input gradient"
        with record(self.timeline, kind, self.stage_index, bwd_chunk_id):
            self._gradients.start(last=last_backward and full_backward)
            self._gradients.postpone(None if full_backward else self._waiting)
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
            self._gradients.postpone(None)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """torch's: the gradients that waited."""
        with record(self.timeline, "weight gradient", self.stage_index, bwd_chunk_id):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)

    def _weight_gradients(self) -> Callable[[], None]:
        """What a backward left for later, to be called then."""
        waiting, self._waiting = self._waiting, []

        @torch.no_grad()
        def run() -> None:
            for gradient in waiting:
                gradient()

        return run


def _like(pipeline: Pipeline) -> dict[str, Any]:
    return {"dtype": pipeline.batches.dtype, "device": pipeline.mesh.device}


def _zero(mesh: Mesh) -> Tensor:
    return torch.zeros((), device=mesh.device)

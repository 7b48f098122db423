"""Plans for the terminal: a table of the best ones, and one with its formulas."""

from collections.abc import Sequence
from dataclasses import fields

from tpformer.planner.cost import Kind, StepTime, model_flops, pace
from tpformer.planner.flags import torchrun_command
from tpformer.planner.memory import Memory, explain_memory
from tpformer.planner.search import Plan
from tpformer.planner.traffic_table import formulas

AXES: tuple[Kind, ...] = ("tp", "pp", "dp")


def table(plans: Sequence[Plan]) -> str:
    """The layouts with their time, then their memory and what each sends; then the command that runs the first."""
    first = plans[0]
    lines = [heading(first), "", time_table(plans), "", *_memory_lines(plans), ""]
    lines += ["the first is run by", "  " + torchrun_command(first.candidate, first.machine.device.per_node)]
    return "\n".join(lines)


def heading(found: Plan) -> str:
    """What was asked, with the figures that the prediction stands on."""
    c, device, network = found.candidate, found.machine.device, found.machine.network
    tokens = c.batch_size * c.seq_len
    return (
        f"PREDICTED, not measured: {c.model.num_parameters() / 1e9:.2f}B parameters on {c.world_size} x {device.name}, "
        f"{c.batch_size} samples of {c.seq_len} = {tokens:,} tokens a step, {c.parallel.precision}\n"
        f"matmuls {1e-12 / pace(c, found.machine).matmul:.3g} of "
        f"{device.peak(c.parallel.precision) / 1e12:.3g} TFLOP/s, memory {device.memory / 2**30:.0f} GiB; in the node "
        f"{device.link.name} {device.link.bandwidth / 1e9:.0f} GB/s, between nodes {network.name} "
        f"{network.bandwidth / 1e9:.0f} GB/s a device"
    )


def time_table(plans: Sequence[Plan]) -> str:
    """A line a layout: what it is, its step's time, and what of that is waiting."""
    lines = [
        f"{'#':>2} {'tp':>4} {'pp':>3} {'schedule':26} {'dp':>5} {'mode':>9} {'micro':>5} {'again':>5} {'step':>8}"
        f" {'tokens/s':>8} {'MFU':>5} {'bubble':>6} {'waits: tp':>9} {'pp':>4} {'dp':>4}",
        f"{'batch':>60} {'s':>14} {'a device':>8} {'%':>5} {'%':>6} {'%':>9} {'%':>4} {'%':>4}",
    ]
    for number, found in enumerate(plans, 1):
        c, p = found.candidate, found.candidate.parallel
        stages = f" x{p.num_stages // p.pp}" if p.num_stages > p.pp else ""
        schedule = f"{p.pp_schedule}{stages}" if p.pp > 1 else "-"
        mode = p.dp_mode + (f" {p.dp_shard}" if p.dp_shard else "") if c.dp > 1 else "-"
        again = "+".join(p.recompute_modules) if p.recompute == "selective" else p.recompute.replace("none", "-")
        waits = [100 * found.time.of(axis) / found.seconds for axis in AXES]
        tp = f"{p.tp}sp" if p.sequence_parallel else str(p.tp)
        lines.append(
            f"{number:>2} {tp:>4} {p.pp:>3} {schedule:26} {c.dp:>5} {mode:>9} {c.micro_batch_size:>5} {again:>5}"
            f" {found.seconds:>8.3f} {found.tokens_per_second / c.world_size:>8.0f} {100 * found.mfu:>5.1f}"
            f" {100 * found.bubble:>6.1f} {waits[0]:>9.1f} {waits[1]:>4.1f} {waits[2]:>4.1f}"
        )
    return "\n".join(lines)


def _memory_lines(plans: Sequence[Plan]) -> list[str]:
    names = [field.name for field in fields(Memory) if field.name in _PARTS]
    lines = [
        f"{'':>3} "
        + " ".join(f"{name:>11}" for name in (*names, "total"))
        + "   sent a step: "
        + " ".join(f"{a:>7}" for a in AXES),
        f"{'':>3} {'GiB':>11}" + " " * (12 * len(names)) + f"{'GiB':>23}",
    ]
    for number, found in enumerate(plans, 1):
        sizes = [*(getattr(found.memory, name) for name in names), found.memory.total]
        sent = [sent_bytes(found, axis) for axis in AXES]
        lines.append(
            f"{number:>3} "
            + " ".join(f"{size / 2**30:>11.2f}" for size in sizes)
            + " " * 16
            + " ".join(f"{size / 2**30:>7.2f}" for size in sent)
        )
    return lines


_PARTS = ("parameters", "gradients", "optimizer", "activations", "buffers")


def sent_bytes(found: Plan, axis: str) -> int:
    """Payload of a step's collectives on an axis (dp's parts, and the world, with dp), as the trace counts it."""
    mine = [t for t in found.traffic if (t.axis if t.axis in ("tp", "pp") else "dp") == axis]
    return sum(t.bytes * t.calls for t in mine)


def explain(found: Plan) -> str:
    """Every term of one plan's time and memory with the numbers that make it, and what it sends."""
    c, time = found.candidate, found.time
    lines = [heading(found), "", "time: terms, each the product of its factors", *time_lines(time)]
    lines += [
        f"MFU {found.mfu:.1%} = {model_flops(c):.4g} FLOPs of the model / ({found.seconds:.4g} s x {c.world_size} "
        f"devices x {found.machine.device.peak(c.parallel.precision):.4g} FLOP/s)",
        "",
        explain_memory(found.memory),
        "",
        "collectives of the busiest rank in a step",
        formulas(found.traffic),
    ]
    return "\n".join(lines)


def time_lines(time: StepTime) -> list[str]:
    """A line a term, then their sum."""
    lines = []
    for term in time.terms:
        formula = " x ".join(f"{name} {number:.4g}" for name, number in term.factors)
        lines.append(f"  {term.kind:>9}  {1e3 * term.seconds:>11.3f} ms  {term.what} = {formula}")
    return [*lines, f"  {'step':>9}  {1e3 * time.total:>11.3f} ms"]

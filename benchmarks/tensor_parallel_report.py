"""What the comparison of tensor parallelism on one machine comes to: its ratios, and its table."""

from typing import Any

from benchmarks import harness


def comparisons(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The ratios of times that this benchmark is for; below 1 the first named is the faster."""
    times = {row["name"]: row["median_ms"] for row in rows}
    ours = [row["name"] for row in rows if row["kind"] == "tpformer"]
    pairs = [(name, name.replace("tpformer", "DTensor")) for name in ours] + [(ours[0], "plain tp=1")]
    return {f"{mine} / {theirs}": times[mine] / times[theirs] for mine, theirs in reversed(pairs)}


def print_table(record: dict[str, Any]) -> None:
    """The record as a table for the terminal."""
    print(f"\nmilliseconds of forward + backward, {record['config']['dtype']}, on {record['environment']['device']}")
    print(f"large fp32 matmuls of tpformer on this CPU: {record['cpu_matmul']}")
    print(f"peak MiB of each rank, alone: {record['peak_memory_is']}")
    print(f"{'variant':16}{'median':>9}{'p20':>9}{'p80':>9}{'quiet':>8}{'/ plain':>9}{'effic.':>8}  peak MiB")
    for row in record["variants"]:
        quiet = f"{row['quiet']}/{row['total']}{'*' if row['used_all'] else ''}"
        peaks = ", ".join("-" if peak is None else f"{peak / 2**20:.0f}" for peak in row["peak_memory_bytes"])
        print(
            f"{row['name']:16}{row['median_ms']:9.1f}{row['p20_ms']:9.1f}{row['p80_ms']:9.1f}{quiet:>8}"
            f"{row['ratio_to_plain']:9.3f}{row['efficiency']:8.3f}  {peaks or '-'}"
        )
    if any(row["used_all"] for row in record["variants"]):
        print(f"* fewer than {harness.FEWEST_QUIET} steps were quiet, so all of them count")
    for name, ratio in record["ratios"].items():
        print(f"{name}: {ratio:.3f} of the time")

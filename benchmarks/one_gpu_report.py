"""What the one-GPU comparison leaves behind: a record, its table and its bar chart."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from benchmarks import harness


def write(stem: Path, record: dict[str, Any]) -> None:
    """Write <stem>.json, print the table, and write <stem>.png where matplotlib is installed."""
    harness.write_json(stem.with_suffix(".json"), record)
    print("\n".join(["", *table(record), f"written to {stem}.json"]), flush=True)
    try:
        plot(stem.with_suffix(".png"), record)
    except ImportError as error:  # what was measured must not be lost for want of a chart
        print(f"no chart: {error}")


def title(record: dict[str, Any]) -> str:
    """The model and the batch in one line."""
    c = record["config"]
    return (
        f"{record['parameters'] / 1e6:,.0f}M Llama, {c['num_layers']} layers, {record['dtype']}, "
        f"{c['batch']} x {c['max_seq_len']} tokens, {record['environment']['device']}"
    )


def table(record: dict[str, Any]) -> list[str]:
    """The record as lines of at most 100 columns."""
    rates = record["flops_per_second"]
    peak = f", of the data sheet's {rates['datasheet'] / 1e12:.0f}" if rates["datasheet"] else ""
    measured = f"torch.mm's {rates['matmul'] / 1e12:.1f} TFLOP/s measured here"
    lines = [
        f"forward + backward: {title(record)}"[:100],
        f"MFU, in %: of {measured}{peak}; causality not counted"[:100],
        f"{'':22}{'median ms':>10}{'p20':>9}{'p80':>9}{'/ plain':>9}{'tokens/s':>10}{'MFU mm':>8}{'sheet':>7}"
        f"{'peak GiB':>10}",
    ]
    lines += [line(row) for row in record["contenders"]]
    breaks = {row["name"]: row["graph_breaks"] for row in record["contenders"] if row.get("graph_breaks")}
    lines += [f"{name}: {count} graph breaks" for name, count in breaks.items()]
    return lines + verdicts(record["contenders"])


def line(row: dict[str, Any]) -> str:
    """One contender of the table."""
    if row["failure"] is not None:
        return f"{row['name']:22}failed: {row['failure']}"[:100]
    mfu, memory = row["mfu"], row["peak_memory_bytes"]
    return (
        f"{row['name']:22}{row['median_ms']:10.1f}{row['p20_ms']:9.1f}{row['p80_ms']:9.1f}"
        f"{row['ratio_to_plain']:9.3f}{row['tokens_per_second']:10.0f}{100 * mfu['matmul']:8.1f}"
        f"{'-' if mfu['datasheet'] is None else format(100 * mfu['datasheet'], '.1f'):>7}"
        f"{'-' if memory is None else format(memory / 2**30, '.1f'):>10}"
    )


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """The fastest tpformer's time over every other contender's; below 1 ours is ahead."""
    done = [row for row in rows if row["failure"] is None]
    ours = [row for row in done if row["name"].startswith("tpformer")]
    if not ours:
        return ["no tpformer contender finished"]
    best = min(ours, key=lambda row: row["median_ms"])
    others = [row for row in done if not row["name"].startswith("tpformer")]
    return [f"{best['name']} / {row['name']}: {best['median_ms'] / row['median_ms']:.3f} of the time" for row in others]


def plot(path: Path, record: dict[str, Any]) -> None:
    """A PNG with a bar of tokens/s for each contender that finished, its MFU written on it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in record["contenders"] if row["failure"] is None]
    figure = Figure(figsize=(9, 1.2 + 0.5 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colors = ["tab:blue" if row["name"].startswith("tpformer") else "tab:gray" for row in rows]
    bars = axes.barh([row["name"] for row in rows], [row["tokens_per_second"] for row in rows], color=colors)
    # of the data sheet where there is one, as others report it
    kind = "matmul" if record["flops_per_second"]["datasheet"] is None else "datasheet"
    labels = [f"{row['tokens_per_second']:,.0f}   MFU {100 * row['mfu'][kind]:.1f} %" for row in rows]
    axes.bar_label(bars, labels, padding=4)
    axes.margins(x=0.3)
    axes.invert_yaxis()
    axes.set_xlabel(
        f"tokens/s, forward + backward; MFU of the {'data sheet' if kind == 'datasheet' else 'torch.mm'} rate"
    )
    axes.set_title(title(record), fontsize=10)
    temporary = path.with_suffix(".partial.png")
    figure.savefig(temporary, dpi=120)
    os.replace(temporary, path)

"""What devices and networks can do, each figure with its source: tables to look up, and the tables' text."""

from pathlib import Path
from typing import Any

from tpformer.planner.machine import Device, Link

# NCCL's own model of a ring under its Simple protocol: seconds of a hop and of a launch
_NCCL_TUNING = "NCCL 2.2x src/graph/tuning.cc: hwLat and baseLat, ring, Simple protocol"
_NVLINK = {"latency": 3.4e-6, "launch": 8.4e-6}
_PCIE = {"latency": 5.7e-6, "launch": 8.4e-6}
_NETWORK = {"latency": 14.0e-6, "launch": 8.4e-6}


def _named(name: str, table: tuple[Any, ...], kind: str) -> Any:
    found = next((one for one in table if one.name == name), None)
    if found is None:
        raise ValueError(f"{kind} ({name!r}) must be one of {', '.join(one.name for one in table)}")
    return found


def _link(name: str, bandwidth: float, source: str, efficiency: tuple[float, str], **figures: Any) -> Link:
    sources = {
        "latency": _NCCL_TUNING,
        "launch": _NCCL_TUNING,
        "efficiency": efficiency[1],
        **figures.pop("sources", {}),
    }
    return Link(name, bandwidth, figures.pop("latency"), source, efficiency[0], sources=sources, **figures)


_NDR = (0.94, "NVIDIA/nccl-tests issue 290 (2025): 46 to 48 GB/s of an NDR adapter's 50")
_HDR = (0.94, "assumed as NDR's; NVIDIA/nccl-tests issue 119 (2022): at most 96 GB/s of 4 HDR adapters' 100")
_ROCE = (0.75, "NVIDIA/nccl issue 495 (2021): 600 of 800 Gb/s over 8 x 100 Gb/s RoCE")
_SWITCHED = {
    "in_switch": "NVIDIA/nccl-tests issue 212 (2024): algorithm bandwidth 275 GB/s, bus bandwidth 480, by NVLS"
}

_LINKS = (
    _link(
        "nvlink2", 150e9, "V100 white paper 2017: 6 links x 25 GB/s each way", (0.8, "assumed as nvlink3's"), **_NVLINK
    ),
    _link(
        "nvlink3",
        300e9,
        "A100 white paper 2020: 12 links x 25 GB/s each way",
        (0.78, "S. Bekman, ml-engineering network/README: nccl-tests all_reduce 235 GB/s on 8 A100"),
        **_NVLINK,
    ),
    _link(
        "nvlink4",
        450e9,
        "H100 white paper 2022: 18 links x 25 GB/s each way",
        (0.82, "NVIDIA/nccl-tests issue 212 (2024): 370 GB/s after the protocol's overhead, by rings"),
        in_switch=275e9,
        sources=_SWITCHED,
        **_NVLINK,
    ),
    _link(
        "nvlink5",
        900e9,
        "Blackwell architecture brief 2024: 18 links x 50 GB/s each way",
        (0.82, "assumed as nvlink4's; Azure/AI-benchmarking-guide issue 7 (2025): 770 GB/s from one to another"),
        in_switch=463e9,
        sources={
            "in_switch": "L. X. Duan 2025, GB200: all_reduce bus bandwidth 811 GB/s on 8, that is 463 of algorithm"
        },
        **_NVLINK,
    ),
    _link("pcie3", 15.75e9, "PCIe 3.0: 16 lanes x 8 GT/s, 128b/130b", (0.75, "assumed"), **_PCIE),
    _link("pcie4", 31.5e9, "PCIe 4.0: 16 lanes x 16 GT/s, 128b/130b", (0.75, "assumed"), **_PCIE),
    _link(
        "pcie5",
        63e9,
        "PCIe 5.0: 16 lanes x 32 GT/s, 128b/130b",
        (0.65, "Alaya NeW, NCCL-tests in practice (2026): 35 to 45 GB/s on 8 H100 PCIe"),
        **_PCIE,
    ),
    _link(
        "infinity-fabric",
        448e9,
        "MI300X data sheet 2023: 7 links x 64 GB/s each way, one to each neighbour",
        (0.70, "S. Bekman, ml-engineering network/README: 312.9 GB/s on 8 MI300X (47.7 on 2: one link only)"),
        **_NVLINK,
    ),
    _link("ib-50", 6.25e9, "DGX-2H: 8 EDR adapters of 100 Gb/s to 16 GPUs (arXiv 1909.08053)", _HDR, **_NETWORK),
    _link("ib-100", 12.5e9, "EDR: one 100 Gb/s adapter a GPU", _HDR, **_NETWORK),
    _link("ib-200", 25e9, "HDR: one 200 Gb/s adapter a GPU (DGX A100: 8 to 8 GPUs)", _HDR, **_NETWORK),
    _link("ib-400", 50e9, "NDR: one 400 Gb/s adapter a GPU (DGX H100: 8 to 8 GPUs)", _NDR, **_NETWORK),
    _link("ib-800", 100e9, "XDR: one 800 Gb/s adapter a GPU", (0.94, "assumed as NDR's"), **_NETWORK),
    _link("ethernet-100", 12.5e9, "RoCE: one 100 Gb/s adapter a GPU", _ROCE, **_NETWORK),
    _link("ethernet-400", 50e9, "RoCE: one 400 Gb/s adapter a GPU", (0.75, "assumed as ethernet-100's"), **_NETWORK),
    Link("loopback", 1.5e9, 150e-6, "assumed: gloo over TCP within a machine; `tpformer calibrate` measures"),
)


def link(name: str) -> Link:
    """A way between devices, by its name. Raises ValueError for another name."""
    return _named(name, _LINKS, "link")


_MAMF = "S. Bekman, ml-engineering, table of maximum achievable matmul FLOPS"
_POINTWISE = "assumed: large copies reach 0.80 to 0.92 of a data sheet's bandwidth"


def _gpu(name: str, flops: tuple[float, float, float], memory: tuple[float, float], **rest: Any) -> Device:
    """flops: TFLOP/s of fp32 without tensor cores, bf16 (0 if none), fp16; memory: GB and TB/s."""
    rates = dict(zip(("fp32", "bf16", "fp16"), (rate * 1e12 for rate in flops), strict=True))
    efficiency, why = rest.pop("matmul")
    return Device(
        name,
        {precision: rate for precision, rate in rates.items() if rate},
        memory[0] * 1e9,
        memory[1] * 1e12,
        rest.pop("per_node", 8),
        link(rest.pop("link")),
        rest.pop("source"),
        efficiency,
        0.85,
        sources={"matmul_efficiency": why, "bandwidth_efficiency": _POINTWISE},
    )


_V100 = {"link": "nvlink2", "matmul": (0.66, "Markidis et al. 2018, arXiv 1803.04014: 83 of 125 TFLOP/s")}
_A100 = {"link": "nvlink3", "matmul": (0.859, f"{_MAMF}: 267.9 of 312")}
_H100 = {"link": "nvlink4", "matmul": (0.801, f"{_MAMF}: 792.1 of 989")}
_H200 = {**_H100, "matmul": (0.801, "assumed as h100-sxm's: the same processor and power")}
_B200 = {"link": "nvlink5", "matmul": (0.776, f"{_MAMF}: 1745 of 2250")}
_GB200 = {**_B200, "matmul": (0.776, "assumed as b200's")}
_DGX_2H = "DGX-2H 2018: 2.1 PFLOP/s of 16 GPUs at 450 W; fp32 in proportion, memory of the V100 data sheet"

_DEVICES = (
    _gpu("v100-sxm2-16", (15.7, 0, 125), (16, 0.9), source="V100 data sheet 2020", **_V100),
    _gpu("v100-sxm2-32", (15.7, 0, 125), (32, 0.9), source="V100 data sheet 2020", **_V100),
    _gpu("v100-dgx-2h", (16.5, 0, 131), (32, 0.9), source=_DGX_2H, per_node=16, **_V100),
    _gpu("a100-sxm-40", (19.5, 312, 312), (40, 1.555), source="A100 data sheet 2021", **_A100),
    _gpu("a100-sxm-80", (19.5, 312, 312), (80, 2.039), source="A100 data sheet 2021", **_A100),
    _gpu(
        "a100-pcie",
        (19.5, 312, 312),
        (80, 1.935),
        source="A100 data sheet 2021, 80 GB",
        link="pcie4",
        matmul=(0.822, f"{_MAMF}: 256.4 of 312"),
    ),
    _gpu("h100-sxm", (67, 989, 989), (80, 3.35), source="H100 data sheet 2023, half of the sparse rates", **_H100),
    _gpu(
        "h100-pcie",
        (51, 756, 756),
        (80, 2.0),
        source="H100 data sheet 2022, half of the sparse rates",
        link="pcie5",
        matmul=(0.65, "assumed: 350 W, half of what h100-sxm may take"),
    ),
    _gpu("h200", (67, 989, 989), (141, 4.8), source="H200 data sheet 2024, half of the sparse rates", **_H200),
    _gpu("b200", (75, 2250, 2250), (180, 8.0), source="HGX and DGX B200 data sheets 2024, an eighth of each", **_B200),
    _gpu("gb200", (80, 2500, 2500), (186, 8.0), source="GB200 NVL72 page 2024, a 72nd", per_node=72, **_GB200),
    _gpu(
        "mi300x",
        (163.4, 1307.4, 1307.4),
        (192, 5.3),
        source="MI300X data sheet 2023",
        link="infinity-fabric",
        matmul=(0.60, f"{_MAMF}: 781.9 of 1300"),
    ),
    Device(
        "cpu",
        {"fp32": 100e9},
        4e9,
        10e9,
        8,
        link("loopback"),
        "assumed, of one core with AVX2; `tpformer calibrate` measures this machine's",
        overhead=1e-3,
    ),
)
_TORCH_NAMES = (  # what torch.cuda.get_device_name() contains, the more telling first
    ("V100-SXM2-16GB", "v100-sxm2-16"),
    ("V100-SXM2-32GB", "v100-sxm2-32"),
    ("V100-SXM3-32GB-H", "v100-dgx-2h"),
    ("V100-SXM3-32GB", "v100-sxm2-32"),
    ("A100-SXM4-40GB", "a100-sxm-40"),
    ("A100-SXM4-80GB", "a100-sxm-80"),
    ("A100 80GB PCIe", "a100-pcie"),
    ("H100 80GB HBM3", "h100-sxm"),
    ("H100 PCIe", "h100-pcie"),
    ("H200", "h200"),
    ("GB200", "gb200"),
    ("B200", "b200"),
    ("MI300X", "mi300x"),
)


def device(name: str) -> Device:
    """By its name in the table, or the one in a .json file. Raises ValueError for another.

    The file is one that `tpformer calibrate` wrote.
    """
    if name.endswith(".json"):
        return Device.from_json(Path(name).read_text())
    return _named(name, _DEVICES, "device")


def find_device(torch_device_name: str) -> Device | None:
    """The one that torch.cuda.get_device_name() names, None if the table lacks it."""
    names = (name for part, name in _TORCH_NAMES if part in torch_device_name)
    found = next(names, None)
    return None if found is None else device(found)


def hardware_table() -> str:
    """Every device and link with its figures, then where each comes from."""
    lines = [f"{'device':<14}{'fp32':>7}{'bf16':>7}{'fp16':>7} TFLOP/s{'GB':>6}{'TB/s':>7}{'a node':>8}  link"]
    for one in _DEVICES:
        rates = "".join(
            f"{one.flops[kind] / 1e12:>7.4g}" if kind in one.flops else f"{'-':>7}" for kind in ("fp32", "bf16", "fp16")
        )
        memory = f"{one.memory / 1e9:>6.0f}{one.bandwidth / 1e12:>7.3g}"
        lines.append(f"{one.name:<14}{rates}{'':8}{memory}{one.per_node:>8}  {one.link.name}")
    lines += ["", f"{'link':<17}{'GB/s':>7}{'reached':>9}{'us a hop':>10}   (one direction, of one device)"]
    for way in _LINKS:
        lines.append(f"{way.name:<17}{way.bandwidth / 1e9:>7.4g}{way.efficiency:>9.0%}{way.latency * 1e6:>10.3g}")
    figures: dict[str, list[str]] = {}
    for entry in (*_DEVICES, *_LINKS):
        figures.setdefault(entry.source, []).append(entry.name)
        for figure, source in entry.sources.items():
            figures.setdefault(source, []).append(f"{figure} of {entry.name}: {getattr(entry, figure):.4g}")
    lines += ["", "sources", *(f"  {source}\n    {'; '.join(names)}" for source, names in figures.items())]
    return "\n".join(lines)

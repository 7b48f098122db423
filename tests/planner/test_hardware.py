"""The hardware tables agree with whole systems' data sheets and with measured curves; a file keeps every figure."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from tpformer.planner.hardware import device, find_device, hardware_table, link
from tpformer.planner.machine import Device, Link, Timing

GPUS = (
    "v100-sxm2-16 v100-sxm2-32 v100-dgx-2h a100-sxm-40 a100-sxm-80 a100-pcie h100-sxm h100-pcie h200 b200 gb200 mi300x"
)
DEVICES = [*GPUS.split(), "cpu"]
NVLINKS, NETWORKS = "nvlink2 nvlink3 nvlink4 nvlink5", "ib-50 ib-100 ib-200 ib-400 ib-800 ethernet-100 ethernet-400"
LINKS = [*NVLINKS.split(), *NETWORKS.split(), "pcie3", "pcie4", "pcie5", "infinity-fabric", "loopback"]
MEASURED = Link(
    "measured",
    1e9,
    1e-3,
    "a test",
    measured=(Timing("all_reduce", 2, 1e-4, 3e9), Timing("all_reduce", 4, 5e-4, 1e9)),
)


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_is_complete_and_each_figure_has_a_source(name: str) -> None:
    one = device(name)
    assert one.name == name
    assert one.source
    assert min(*one.flops.values(), one.memory, one.bandwidth, one.per_node) > 0
    assert 0.5 <= one.matmul_efficiency <= 1
    assert 0.5 <= one.bandwidth_efficiency <= 1
    assert one.sources.keys() <= {field.name for field in fields(one)}
    if name != "cpu":
        assert one.sources.keys() == {"matmul_efficiency", "bandwidth_efficiency"}


@pytest.mark.parametrize("name", LINKS)
def test_a_link_is_complete_and_each_figure_has_a_source(name: str) -> None:
    way = link(name)
    assert way.name == name
    assert way.source
    assert min(way.bandwidth, way.latency) > 0
    assert 0.5 <= way.efficiency <= 1
    given = {
        figure for figure, none in (("launch", 0), ("in_switch", 0), ("efficiency", 1)) if getattr(way, figure) != none
    }
    assert given <= way.sources.keys()


@pytest.mark.parametrize(
    ("name", "devices", "petaflops", "terabytes", "terabytes_a_second"),
    [  # of whole systems' own data sheets: DGX-1V, DGX-2, DGX A100, DGX H100 (sparse halved), DGX B200, GB200 NVL72
        ("v100-sxm2-32", 8, 1.0, 0.256, 7.2),
        ("v100-sxm2-32", 16, 2.0, 0.512, 14.4),
        ("v100-dgx-2h", 16, 2.1, 0.512, 14.4),
        ("a100-sxm-40", 8, 2.5, 0.320, 12.4),
        ("a100-sxm-80", 8, 2.5, 0.640, 16.3),
        ("h100-sxm", 8, 15.8 / 2, 0.640, 26.8),
        ("h200", 8, 15.8 / 2, 1.128, 38.4),
        ("b200", 8, 36 / 2, 1.440, 64),
        ("gb200", 72, 360 / 2, 13.4, 576),
        ("mi300x", 8, 10.46, 1.536, 42.4),
    ],
)
def test_devices_add_up_to_their_systems(
    name: str, devices: int, petaflops: float, terabytes: float, terabytes_a_second: float
) -> None:
    one = device(name)
    assert devices * one.flops["fp16"] / 1e15 == pytest.approx(petaflops, rel=0.01)
    assert devices * one.memory / 1e12 == pytest.approx(terabytes, rel=0.01)
    assert devices * one.bandwidth / 1e12 == pytest.approx(terabytes_a_second, rel=0.01)


def test_a_v100_has_no_bf16() -> None:
    assert device("v100-sxm2-32").peak("fp16") == 125e12
    with pytest.raises(ValueError, match="v100-sxm2-32 has no bf16 matmul rate, only fp32 and fp16"):
        device("v100-sxm2-32").peak("bf16")


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ValueError, match=r"device \('h100'\) must be one of .*h100-sxm, h100-pcie"):
        device("h100")
    with pytest.raises(ValueError, match=r"link \('nvlink'\) must be one of nvlink2, nvlink3"):
        link("nvlink")


@pytest.mark.parametrize(
    ("torch_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-sxm-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm-80"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie"),
        ("Tesla V100-SXM2-16GB", "v100-sxm2-16"),
        ("Tesla V100-SXM2-32GB", "v100-sxm2-32"),
        ("Tesla V100-SXM3-32GB-H", "v100-dgx-2h"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_torch_names_find_their_device(torch_name: str, name: str) -> None:
    found = find_device(torch_name)
    assert found is not None
    assert found.name == name


def test_other_torch_names_find_none() -> None:
    assert find_device("NVIDIA GeForce RTX 4090") is None


@pytest.mark.parametrize(
    ("name", "size", "microseconds"),
    [  # all_reduce_perf on 8 GPUs with NVLink 4, kvcache-ai/Mooncake pull request 3484: rings' times
        ("nvlink4", 8 << 20, 81.2),
        ("nvlink4", 16 << 20, 121.3),
        ("nvlink4", 32 << 20, 195.4),
    ],
)
def test_large_all_reduces_take_what_was_measured(name: str, size: int, microseconds: float) -> None:
    assert link(name).seconds("all_reduce", size, 8) * 1e6 == pytest.approx(microseconds, rel=0.15)


def test_a_ring_moves_what_the_textbook_says() -> None:
    way = Link("ring", 1e9, 1e-3, "a test", efficiency=0.5, launch=1e-2)
    assert way.seconds("all_reduce", 8_000_000, 4) == pytest.approx(1e-2 + 6e-3 + 2 * 3 / 4 * 8e6 / 0.5e9)
    assert way.seconds("all_gather", 8_000_000, 4) == pytest.approx(1e-2 + 3e-3 + 3 / 4 * 8e6 / 0.5e9)
    assert way.seconds("reduce_scatter", 8_000_000, 4) == way.seconds("all_gather", 8_000_000, 4)
    assert way.seconds("send", 8_000_000, 2) == pytest.approx(1e-2 + 1e-3 + 8e6 / 0.5e9)
    assert way.seconds("all_reduce", 8_000_000, 1) == 0


def test_switches_that_sum_help_large_groups_only() -> None:
    way, rings = link("nvlink4"), replace(link("nvlink4"), in_switch=0.0)
    assert way.seconds("all_reduce", 1 << 30, 8) < 0.8 * rings.seconds("all_reduce", 1 << 30, 8)
    assert way.seconds("all_reduce", 1 << 30, 2) == rings.seconds("all_reduce", 1 << 30, 2)
    assert way.seconds("all_gather", 1 << 30, 8) == rings.seconds("all_gather", 1 << 30, 8)


def test_what_was_measured_takes_the_rings_place() -> None:
    assert MEASURED.seconds("all_reduce", 3_000_000, 2) == pytest.approx(1e-4 + 1e-3)
    assert MEASURED.seconds("all_reduce", 3_000_000, 8) == pytest.approx(5e-4 + 3e-3)
    assert MEASURED.seconds("all_gather", 3_000_000, 2) == pytest.approx(1e-3 + 1.5e-3)
    assert MEASURED.seconds("all_reduce", 3_000_000, 1) == 0
    with pytest.raises(ValueError, match=r"op \('broadcast'\) must be all_reduce, all_gather, reduce_scatter or send"):
        MEASURED.seconds("broadcast", 1, 2)


@pytest.mark.parametrize("name", [*DEVICES, "measured"])
def test_a_file_keeps_every_figure(name: str, tmp_path: Path) -> None:
    one = replace(device("cpu"), link=MEASURED, overhead=1 / 3e4) if name == "measured" else device(name)
    path = tmp_path / "machine.json"
    path.write_text(one.to_json())
    assert device(str(path)) == one


@pytest.mark.parametrize(
    "broken",
    ["", "[]", "{}", "lists", "no schema", "another schema", "no link", "another figure", "another timing"],
)
def test_other_files_are_refused(broken: str) -> None:
    written = json.loads(replace(device("cpu"), link=MEASURED).to_json())
    assert Device.from_json(json.dumps(written)) == replace(device("cpu"), link=MEASURED)
    if broken == "no schema":
        del written["schema"]
    elif broken == "another schema":
        written["schema"] = 0
    elif broken == "no link":
        del written["link"]
    elif broken == "another figure":
        written["speed"] = 1
    elif broken == "another timing":
        written["link"]["measured"][0]["speed"] = 1
    with pytest.raises(ValueError, match="not a device as `tpformer calibrate` writes it"):
        Device.from_json(broken if broken in ("", "[]", "{}") else "[[]]" if broken == "lists" else json.dumps(written))


def test_the_printed_table_has_every_name_and_source() -> None:
    text = hardware_table()
    assert max(len(line) for line in text.splitlines() if not line.startswith("  ")) <= 100
    entries: list[Device | Link] = [*map(device, DEVICES), *map(link, LINKS)]
    for entry in entries:
        assert f"\n{entry.name} " in text
        assert entry.source in text
        assert all(source in text for source in entry.sources.values())

"""Invented facts."""

from typing import Any

from tpformer.doctor.facts import GPU, Facts, Ptxas

HOPPER, AMPERE, TURING = (
    GPU(name, capability, 80 * 2**30, 132, max(80, capability))
    for name, capability in (("NVIDIA H200", 90), ("NVIDIA A100", 80), ("NVIDIA T4", 75))
)
NEW = Ptxas("13.4", "/opt/ptxas", "TRITON_PTXAS_PATH")
OLD = Ptxas("12.8", "/opt/ptxas", "TRITON_PTXAS_PATH")
BARE = Facts(torch="2.13.0+cpu", numpy="2.4.6")
HEALTHY = Facts(
    torch="2.13.0+cu130",
    torch_cuda="13.0",
    numpy="2.4.6",
    gloo=True,
    nccl="2.28.9",
    triton="3.9.0",
    ptxas={90: NEW},
    compiler="/usr/bin/gcc",
    headers=True,
    driver="580.82.07",
    driver_cuda="13.0",
    driver_gpus=("NVIDIA H200", "NVIDIA H200"),
    gpus=(HOPPER, HOPPER),
    tables={90: "measured on NVIDIA H200, 2026-01-01"},
    blocked=(),
    links=("NV18",),
)
NO_GPU: dict[str, Any] = {"gpus": (), "driver_gpus": (), "tables": {}}
NO_TRITON: dict[str, Any] = {"triton": None, "ptxas": {}}

"""What is measured: the published shapes, each job once, and models and batches that grow as they are said to."""

from dataclasses import replace
from typing import get_args, get_type_hints

import pytest

from benchmarks.peers.plain import PlainLlamaConfig
from benchmarks.scaling import Options, projection
from benchmarks.scaling_jobs import Job, Wish, axes_of, jobs_of, plan
from benchmarks.scaling_presets import PRESETS
from tpformer.parallel.split import stage_parts
from tpformer.parallel_config import ParallelConfig

SMALL = PRESETS["cpu-small"]
EVERY = Wish(("tpformer",), ("tp", "pp", "dp"), (1, 2), ("strong", "weak"))


@pytest.mark.parametrize(
    ("preset", "billions", "efficiency"),
    [
        ("megatron-2019", (1.2, 2.5, 4.2, 8.3), (1.0, 0.95, 0.82, 0.77)),
        ("megatron-2020", (1.16, 2.03, 4.24, 8.67), (1.0, 0.917, 0.845, 0.747)),
    ],
)
def test_megatrons_shapes_have_the_published_sizes(
    preset: str, billions: tuple[float, ...], efficiency: tuple[float, ...]
) -> None:
    jobs = plan(PRESETS[preset], Wish(("tpformer",), ("tp",), (1, 2, 4, 8), ("weak",)))[0].jobs
    digits = len(str(billions[0]).split(".")[1])
    assert tuple(round(job.sizes().num_parameters() / 1e9, digits) for job in jobs) == billions
    published = next(p for p in PRESETS[preset].published if p.mode == "weak")
    assert tuple(published.efficiency[job.degree] for job in jobs) == efficiency


def test_llama3_has_the_published_layers() -> None:
    for name, layers, billions in (("llama3-8b", 32, 8.03), ("llama3-70b", 80, 70.55)):
        model = PRESETS[name].model
        whole = Job("tpformer", "tp", 1, replace(model, num_layers=layers), 1, 1)
        assert round(whole.sizes().num_parameters() / 1e9, 2) == billions


def test_a_job_that_several_series_share_is_measured_once() -> None:
    series = plan(SMALL, EVERY)
    jobs = jobs_of(series)
    assert [(s.axis, s.mode, [jobs.index(job) for job in s.jobs]) for s in series] == [
        ("tp", "strong", [0, 1]),
        ("tp", "weak", [0, 2]),
        ("pp", "strong", [3, 4]),  # the one process beside a pipeline has its micro-batches
        ("pp", "weak", [3, 5]),
        ("dp", "strong", [0, 6]),
        ("dp", "weak", [0, 7]),
    ]
    assert [job.processes for job in jobs] == [1, 2, 2, 1, 2, 2, 2, 2]


def test_strong_scaling_keeps_the_work_and_weak_scaling_keeps_it_for_each_rank() -> None:
    for series in plan(SMALL, replace(EVERY, degrees=(1, 2, 4))):
        for job in series.jobs:
            ratio = job.flops / series.jobs[0].flops
            if series.mode == "strong":
                assert ratio == 1
            elif series.axis == "dp":
                assert ratio == job.degree
            else:  # a wider model's attention, and a pipeline's head, grow a little otherwise
                assert ratio == pytest.approx(job.degree, rel=0.12)


def test_cpu_smalls_pipelines_are_balanced() -> None:
    """A head worth one block: every stage has as many blocks, the last one less."""
    for series in plan(SMALL, replace(EVERY, axes=("pp",), degrees=(2, 4))):
        for job in series.jobs:
            parts = stage_parts(job.sizes(), ParallelConfig(pp=job.degree), job.model.max_seq_len)
            counts = [len(part.layers) for part in parts]
            assert counts == [counts[0]] * (job.degree - 1) + [counts[0] - 1]


def test_peers_have_their_own_axis() -> None:
    assert axes_of("dtensor") == ("tp",) and axes_of("fsdp2") == ("dp",)
    found = plan(SMALL, replace(EVERY, kinds=("plain", "dtensor", "fsdp2"), modes=("strong",)))
    assert [(s.kind, s.axis, [job.degree for job in s.jobs]) for s in found] == [
        ("plain", "tp", [1]),
        ("dtensor", "tp", [1, 2]),
        ("fsdp2", "dp", [1, 2]),
    ]
    with pytest.raises(ValueError, match="megatorn"):
        axes_of("megatorn")


def test_a_job_survives_the_command_line() -> None:
    for preset in PRESETS.values():
        for job in jobs_of(plan(preset, replace(EVERY, kinds=("tpformer", "tpformer_sp")))):
            assert Job.from_json(job.to_json()) == job


def test_a_projection_is_one_process() -> None:
    wish = Options(preset="megatron-2019", mode="weak", project=("tp=2", "tp=8")).wish()
    (series,) = plan(PRESETS["megatron-2019"], wish)
    assert [(job.degree, job.processes, job.projected) for job in series.jobs] == [
        (1, 1, False),
        (2, 1, True),
        (8, 1, True),
    ]
    assert series.jobs[2].label == "tpformer tp=8 PROJECTED"


@pytest.mark.parametrize("text", ["pp=2", "tp", "tp=1", "tp=x", "ep=2", ""])
def test_what_cannot_be_projected_is_told(text: str) -> None:
    with pytest.raises(ValueError, match="project"):
        projection(text)


def test_a_degree_without_a_model_is_told() -> None:
    with pytest.raises(ValueError, match="no model for tp=3"):
        plan(SMALL, replace(EVERY, degrees=(1, 3)))


def test_every_preset_can_be_asked_for() -> None:
    assert set(get_args(get_type_hints(Options)["preset"])) == PRESETS.keys()


def test_models_are_what_peers_can_build() -> None:
    assert isinstance(PRESETS["peers"].model, PlainLlamaConfig)

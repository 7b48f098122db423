"""The wheel, installed in a clean environment outside the repository, runs the README's example."""

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def readme_example() -> str:
    """The first Python block of the README."""
    found = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this tree."""
    directory = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(directory), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    return next(directory.glob("*.whl"))


@pytest.fixture(scope="module")
def clean_python(wheel: Path) -> Path:
    """The interpreter of a new environment that holds the wheel and nothing else."""
    environment = wheel.parent / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=120)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, timeout=120)
    return python


def run(python: Path, code: str, directory: Path) -> str:
    """What the code prints, run elsewhere; torch and the rest come from this environment's packages.

    A folder on PYTHONPATH has its .pth files ignored, so that an editable install of the repository stays unseen.
    """
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
    command = [str(python), "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_runs_the_readme_example(clean_python: Path, tmp_path: Path) -> None:
    assert 8 <= len([line for line in readme_example().splitlines() if line.strip()]) <= 20
    where = "\nimport tpformer, tpformer_kernels\nprint(tpformer.__file__)\nprint(tpformer_kernels.__file__)"
    *_, package, kernels = run(clean_python, readme_example() + where, tmp_path).splitlines()
    assert Path(package).is_relative_to(clean_python.parents[1])
    assert Path(kernels).is_relative_to(clean_python.parents[1])


def test_the_wheel_holds_no_tests_and_no_top_level_kernels(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name.split("/")[0] for name in archive.namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"tpformer", "tpformer_kernels"}


def test_build_a_model_trains_alone(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, str(ROOT / "examples" / "build_a_model.py")]
    alone = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert alone.returncode == 0, alone.stderr
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", command[1]]
    environment["OMP_NUM_THREADS"] = "1"
    split = subprocess.run(launcher, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert split.returncode == 0, split.stderr
    losses = [[float(v) for v in re.findall(r"loss ([\d.]+)", out.stdout)] for out in (alone, split)]
    assert len(losses[0]) == 5
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < 1 < losses[0][0]

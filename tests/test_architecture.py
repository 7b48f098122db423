"""The source keeps to its design: imports point one way, no globals, no pickle, and importing does no work.

Each rule is a function from source text to complaints, and is shown to complain about a text that breaks it.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOUNDATIONS = {"parallel_config", "mesh", "collectives", "symmetric_memory", "overlap", "placement", "random", "trace"}
KERNELS = "tpformer_kernels"

# What each part of tpformer may import of the others; its own modules always. A part that is not named here fails.
MAY_IMPORT: dict[str, set[str]] = {
    "parallel_config": set(),
    "mesh": {"parallel_config"},
    "random": set(),
    "trace": set(),
    "collectives": {"mesh"},
    "symmetric_memory": {"collectives"},
    "overlap": {"mesh", "collectives", "symmetric_memory"},
    "placement": {"mesh", "collectives"},
    "layers": {"mesh", "collectives", "overlap", "placement", "random", KERNELS},
    "models": FOUNDATIONS | {"layers", KERNELS},
    "parallel": FOUNDATIONS | {"layers", "models"},
    "checkpoint": FOUNDATIONS | {"layers", "models", "parallel"},
    "data": set(),
    "planner": {"parallel_config", "mesh", "models", "layers", "placement", "parallel", "checkpoint", KERNELS},
    "doctor": {KERNELS},
    "train": FOUNDATIONS | {"layers", "models", "parallel", "checkpoint", "data", "planner"},
    "__init__": FOUNDATIONS | {"layers", "models", "parallel", "checkpoint", "data", "planner"},
    "__main__": {"doctor", "checkpoint", "planner"},
}
NUMERIC = {"torch", "numpy"}
PACKAGES: dict[str, set[str]] = {  # what each part may import from outside, beside the standard library
    KERNELS: {"torch", "triton"},
    "data": NUMERIC | {"tqdm", "tokenizers"},
    "models": {"torch", "tqdm"},
    "checkpoint": NUMERIC | {"safetensors", "einops", "tqdm"},
    "train": NUMERIC | {"tqdm", "tyro", "tomli_w", "matplotlib"},
    "planner": NUMERIC | {"matplotlib", "tqdm"},
    "doctor": NUMERIC | {"triton"},
    "__main__": set(),
}
PLAIN_NUMBERS = {"bubble", "split", "state_bytes", "timeline"}  # of `parallel`, what needs no processes
READS_THE_ENVIRONMENT = {"tpformer/mesh.py", "tpformer/doctor/facts.py"}  # the launcher's part; to report it


def sources() -> Iterator[tuple[str, str]]:
    """Path below the root, and text, of every source file of the two packages."""
    for path in sorted([*(ROOT / "tpformer").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]):
        yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def part_of(path: str) -> str:
    """The part of the design that a file belongs to: its directory or, at the top, itself."""
    if path.startswith("kernels/"):
        return KERNELS
    return path.removeprefix("tpformer/").split("/")[0].removesuffix(".py")


def imported(text: str, path: str) -> set[str]:
    """Every module that a file imports anywhere in it, by its full dotted name."""
    package = path.removesuffix(".py").split("/")[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def wrong_imports(text: str, path: str) -> list[str]:
    part, wrong = part_of(path), []
    for name in sorted(imported(text, path)):
        top, _, rest = name.partition(".")
        if top == "tpformer":
            target = rest.split(".")[0]
            # `from tpformer import Mesh` would load the whole of it
            allowed = part != KERNELS and (target == part or target in MAY_IMPORT.get(part, set()))
        elif top == KERNELS:
            allowed = part == KERNELS or KERNELS in MAY_IMPORT.get(part, set())
        else:
            allowed = top in sys.stdlib_module_names or top in PACKAGES.get(part, {"torch"})
        if not allowed:
            wrong.append(f"{path} imports {name}")
    return wrong


def process_groups_in_the_planner(text: str, path: str) -> list[str]:
    """None but the calibration's, which has processes of its own; of `parallel` what is plain numbers only."""
    names = imported(text, path) if part_of(path) == "planner" else set()
    wrong = {n for n in names if n.startswith("torch.distributed") and path != "tpformer/planner/calibrate.py"}
    wrong |= {n for n in names if n.startswith("tpformer.parallel.") and n.split(".")[2] not in PLAIN_NUMBERS}
    return [f"{path} imports {name}" for name in sorted(wrong)]


def global_statements(text: str, path: str) -> list[str]:
    return [
        f"{path}: global {', '.join(node.names)}" for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Global)
    ]


def environment_reads(text: str, path: str) -> list[str]:
    names = {"environ", "environb", "getenv", "putenv"}
    return [
        f"{path}: {name}"
        for node in ast.walk(ast.parse(text))
        for name in [node.attr if isinstance(node, ast.Attribute) else getattr(node, "name", "")]
        if name in names and path not in READS_THE_ENVIRONMENT
    ]


def pickles(text: str, path: str) -> list[str]:
    found = [
        n for n in imported(text, path) if n.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib")
    ]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            called = f"{node.value.id}.{node.attr}"
            if called in ("torch.load", "torch.save", "np.load", "numpy.load", "pickle.loads"):
                found.append(f"{node.lineno}: {called}")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append("allow_pickle")
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [f"torch.{alias.name}" for alias in node.names if alias.name in ("load", "save")]
    return [f"{path}: {name}" for name in found]


def process_groups_in_kernels(text: str, path: str) -> list[str]:
    names = imported(text, path) if part_of(path) == KERNELS else set()
    return [f"{path} imports {name}" for name in names if name.startswith("torch.distributed")]


Rule = Callable[[str, str], list[str]]
RULES: dict[Rule, list[tuple[str, str]]] = {  # each with texts that break it
    wrong_imports: [
        ("tpformer/mesh.py", "from tpformer.collectives import all_reduce_"),
        ("tpformer/random.py", "import tpformer.mesh"),
        ("tpformer/overlap.py", "from tpformer.layers.linear import column_linear"),
        ("tpformer/layers/linear.py", "from tpformer.models.llama import Llama"),
        ("tpformer/layers/linear.py", "from tpformer import Mesh"),
        ("tpformer/layers/linear.py", "from ..models import llama"),
        ("tpformer/layers/linear.py", "from tpformer.parallel.recompute import recompute"),
        ("tpformer/models/llama.py", "def f():\n    from tpformer.train.step import train_step"),
        ("tpformer/models/llama.py", "import transformers"),
        ("tpformer/models/llama.py", "from tpformer.checkpoint.store import save"),
        ("tpformer/parallel/data.py", "from tpformer.train import step"),
        ("tpformer/data/text.py", "from tpformer.mesh import Mesh"),
        ("tpformer/data/text.py", "import transformers"),
        ("tpformer/checkpoint/store.py", "import tpformer.train.trainer"),
        ("tpformer/train/trainer.py", "from examples import pretrain"),
        ("tpformer/train/trainer.py", "import benchmarks.harness"),
        ("tpformer/train/trainer.py", "from tests.distributed import Ranks"),
        ("tpformer/__init__.py", "from tpformer.train.trainer import Trainer"),
        ("tpformer/__main__.py", "import torch"),
        ("tpformer/doctor/facts.py", "from tpformer.mesh import Mesh"),
        ("tpformer/somewhere_new/file.py", "from tpformer.mesh import Mesh"),
        ("kernels/tpformer_kernels/norm.py", "from tpformer.mesh import Mesh"),
        ("kernels/tpformer_kernels/norm.py", "import numpy"),
        ("kernels/tpformer_kernels/norm.py", "import einops"),
    ],
    process_groups_in_the_planner: [
        ("tpformer/planner/cost.py", "import torch.distributed as dist"),
        ("tpformer/planner/cost.py", "from tpformer.parallel.data import GradientBuckets"),
    ],
    process_groups_in_kernels: [("kernels/tpformer_kernels/norm.py", "from torch import distributed")],
    global_statements: [("tpformer/mesh.py", "x = 1\ndef f():\n    global x\n    x = 2")],
    environment_reads: [
        ("tpformer/train/trainer.py", "import os\nn = os.environ['WORLD_SIZE']"),
        ("tpformer/train/trainer.py", "from os import environ"),
        ("tpformer/layers/linear.py", "import os\nn = os.getenv('X')"),
        ("tpformer/doctor/findings.py", "import os\nn = os.environ['X']"),
        ("kernels/tpformer_kernels/norm.py", "import os as o\nn = o.environ.get('X')"),
    ],
    pickles: [
        ("tpformer/checkpoint/store.py", "import pickle"),
        ("tpformer/checkpoint/store.py", "from pickle import loads"),
        ("tpformer/checkpoint/store.py", "import torch\nx = torch.load('x')"),
        ("tpformer/checkpoint/store.py", "import torch\ntorch.save({}, 'x')"),
        ("tpformer/checkpoint/store.py", "from torch import load"),
        ("tpformer/data/text.py", "import numpy as np\nx = np.load('x', allow_pickle=True)"),
    ],
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_source_keeps_the_rule(rule: Rule) -> None:
    complaints = [complaint for path, text in sources() for complaint in rule(text, path)]
    assert complaints == []


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [(rule, path, text) for rule, broken in RULES.items() for path, text in broken],
    ids=lambda value: value.__name__ if callable(value) else value.split("\n")[-1].strip(),
)
def test_the_rule_can_be_broken(rule: Rule, path: str, text: str) -> None:
    """Negative control: the checker sees each illegal text, on its own and at the end of the real file."""
    assert len(rule(text, path)) >= 1
    if (ROOT / path).exists():
        assert len(rule((ROOT / path).read_text(encoding="utf-8") + "\n" + text, path)) >= 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "tpformer/layers/linear.py",
            "from tpformer.layers.init import draw_uniform\nfrom tpformer_kernels import rms_norm",
        ),
        ("tpformer/models/llama.py", "import math, torch\nfrom torch import nn\nfrom tpformer.random import Key"),
        ("tpformer/train/trainer.py", "from tpformer.data.sampler import TokenSampler\nimport tqdm"),
        ("kernels/tpformer_kernels/norm.py", "import triton.language as tl\nfrom typing import Any"),
    ],
)
def test_the_rule_can_be_kept(path: str, text: str) -> None:
    assert all(rule(text, path) == [] for rule in RULES)


def test_the_rules_read_the_source() -> None:
    found = {part_of(path) for path, _ in sources()}
    assert found >= {*FOUNDATIONS, "layers", "models", "data", "__init__", KERNELS}
    assert found <= {*MAY_IMPORT, KERNELS}
    assert {path for path, _ in sources()} >= {"tpformer/layers/linear.py", "kernels/tpformer_kernels/norm.py"}


def test_what_is_allowed_has_no_cycle() -> None:
    """Imports point one way: some order of the parts has every import pointing back."""
    left = {part: {t for t in targets if t != KERNELS} for part, targets in MAY_IMPORT.items()}
    while left:
        ready = {part for part, targets in left.items() if not targets & left.keys()}
        assert ready, f"a cycle among {sorted(left)}"
        left = {part: targets for part, targets in left.items() if part not in ready}


def test_kernels_is_not_an_import_package() -> None:
    """It would shadow Hugging Face's `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "tpformer_kernels" / "__init__.py").exists()


IMPORT = """
import os, sys
environment = dict(os.environ)
import torch
state, threads = torch.get_rng_state(), torch.get_num_threads()
loaded = set(sys.modules)
import tpformer, tpformer_kernels
assert not torch.distributed.is_initialized(), "a process group"
assert not torch.cuda.is_initialized(), "CUDA is initialised"
assert torch.equal(state, torch.get_rng_state()), "random numbers were drawn"
assert threads == torch.get_num_threads(), "the number of threads changed"
assert torch.get_default_dtype() == torch.float32
assert environment == dict(os.environ), "the environment changed"
heavy = {"transformers", "matplotlib", "tyro", "tokenizers", "tomli_w", "pytest"}
heavy |= {"torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torch.distributed.pipelining"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
ours = {name for name in set(sys.modules) - loaded if name.split(".")[0] == "tpformer"}
assert not {name for name in ours if name.startswith("tpformer.train")}, "tpformer.train"
print(len(ours))
"""


def test_importing_does_no_work(tmp_path: Path) -> None:
    path = [str(ROOT), str(ROOT / "kernels")]
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", f"import sys; sys.path[:0] = {path!r}\n{IMPORT}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert int(run.stdout) > 10
    assert list(tmp_path.iterdir()) == []

"""What the parts of a training step are called: one table, from names of operators and kernels to groups."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

RANGES = {name: f"step: {name}" for name in ("forward", "backward", "optimizer")}
"""The parts of a step, and the names under which a trace shows when each began and ended."""
OTHER = "other"


@dataclass(frozen=True)
class Group:
    """A row of the table: its colour in every chart, and regular expressions for the names that belong to it."""

    color: str
    patterns: tuple[str, ...]

    def knows(self, name: str) -> bool:
        """Whether a pattern is found in the name."""
        return any(re.search(pattern, name) for pattern in self.patterns)


# Order decides: an operator or kernel belongs to the first group that knows its name or that of any operator around
# it. A product inside the norm's backward is norm, one inside the loss is matmul, what else the loss does its own.
GROUPS: dict[str, Group] = {
    "optimizer": Group(
        "#8c564b",
        (rf"^{RANGES['optimizer']}$", r"Optimizer\.step", r"(?i)fused_?adam", r"^aten::_foreach_"),
    ),
    "collectives": Group(
        "#e377c2",
        (
            r"^(c10d|_c10d_functional|nccl|gloo):",
            r"^tpformer::after$",  # what keeps a compiler's gather in its place
            r"^nccl",
            r"^_(Enter|Leave|GatherFeatures|SplitFeatures)(Backward)?$",
        ),
    ),
    "attention": Group(
        "#ff7f0e",
        (
            r"(?i)attention|softmax|scaled_?dot_?product|sdpa|flash_|fmha",
            # of Llama's operators only attention multiplies batches of matrices, or repeats (key and value heads)
            r"^aten::(bmm|baddbmm|repeat_interleave)",
            r"^(Bmm|Expand)Backward",
        ),
    ),
    "rope": Group(
        "#bcbd22",
        (
            r"^_(Rotate|RotateTwo|SplitAndRotate)(Backward)?$",
            r"^(tpformer::|_)rope",
            r"^aten::(cos|sin|outer)$",  # its tables
        ),
    ),
    "norm": Group("#2ca02c", (r"^_Norm(Backward)?$", r"^(tpformer::|_)norm_", r"(?i)(layer|rms)_?norm")),
    "gated, gelu": Group(
        "#9467bd",
        (
            r"^_(GatedPairs|GatedProduct|BiasGelu)(Backward)?$",
            r"^(tpformer::|_)(gated|bias_gelu)_",
            r"^aten::(silu|gelu|relu)",
            r"^(Silu|Gelu|Relu)Backward",
        ),
    ),
    "dropout": Group("#f7b6d2", (r"(?i)dropout",)),
    "embedding": Group("#17becf", (r"^_VocabParallelLookup", r"(?i)embedding")),
    "matmul": Group(
        "#1f77b4",
        (
            r"^_(Column|Row)Linear(Backward)?$",
            r"^(tpformer::|_)matmul",
            r"^tpformer::(accumulate_|onednn)",
            r"^mkldnn::",
            r"^aten::(mm|addmm|mv|addmv|dot|matmul|linear)_?$",
            r"^(Mm|Addmm|Linear)Backward",
            r"(?i)gemm|gemv|cutlass|cublas|nvjet|xmma|splitk",
        ),
    ),
    "cross entropy": Group(
        "#d62728",
        (r"CrossEntropy", r"^_Recomputing", r"^tpformer::cross_entropy", r"^_(statistics|gradient)_kernel$"),
    ),
    # of the residual stream, and of gradients that meet
    "sums": Group("#98df8a", (r"^aten::add_?$", r"^AddBackward", r"AccumulateGrad")),
    "copies, casts": Group(
        "#7f7f7f",
        (
            r"^aten::(to|_to_copy|copy_|clone|contiguous|cat|stack|zeros|zeros_like|new_zeros|zero_|fill_|ones_like)$",
            r"^aten::((slice|select)_backward|empty\w*|reshape|view|\w*flatten|t|transpose|slice|select|as_strided)$",
            r"^(Slice|Select|Clone|ToCopy|Copy|Cat|View|UnsafeView|Transpose|T|Unsqueeze|Reshape|Permute)Backward",
            r"^Mem(cpy|set)\b|copy_kernel|FillFunctor|CatArray",
        ),
    ),
    OTHER: Group("#c7c7c7", ()),
}


def group_of(names: Sequence[str]) -> str:
    """The group of an operator or a kernel, from its own name and those of the operators around it."""
    return next((name for name, group in GROUPS.items() if any(map(group.knows, names))), OTHER)

"""Pure functions on local tensors, the hot path of the layers: no mesh, no process group, no model."""

from tpformer_kernels.accumulate import accumulate_
from tpformer_kernels.apply import apply
from tpformer_kernels.attention import attention, attention_with_lse, explain_attention
from tpformer_kernels.attention_reference import AttentionOptions
from tpformer_kernels.backend import BACKENDS, Backend, check_backend, use_triton
from tpformer_kernels.cross_entropy import ELSEWHERE, IGNORED, cross_entropy_gradient, cross_entropy_statistics
from tpformer_kernels.dropout import dropout_add
from tpformer_kernels.gated import GATES, gated_activation, gated_product
from tpformer_kernels.gelu import bias_gelu
from tpformer_kernels.matmul import fuses_activation, matmul, matmul_activation
from tpformer_kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from tpformer_kernels.onednn import prefers_onednn
from tpformer_kernels.order import after
from tpformer_kernels.philox import philox, random_columns
from tpformer_kernels.rope import apply_rope, split_and_rotate
from tpformer_kernels.softmax import softmax

__all__ = [
    "BACKENDS",
    "ELSEWHERE",
    "GATES",
    "IGNORED",
    "AttentionOptions",
    "Backend",
    "accumulate_",
    "add_layer_norm",
    "add_rms_norm",
    "after",
    "apply",
    "apply_rope",
    "attention",
    "attention_with_lse",
    "bias_gelu",
    "check_backend",
    "cross_entropy_gradient",
    "cross_entropy_statistics",
    "dropout_add",
    "explain_attention",
    "fuses_activation",
    "gated_activation",
    "gated_product",
    "layer_norm",
    "matmul",
    "matmul_activation",
    "philox",
    "prefers_onednn",
    "random_columns",
    "rms_norm",
    "softmax",
    "split_and_rotate",
    "use_triton",
]

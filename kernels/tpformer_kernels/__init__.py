"""Pure functions on local tensors, the hot path of the layers: no mesh, no process group, no model."""

from tpformer_kernels.cross_entropy import cross_entropy_gradient, cross_entropy_statistics
from tpformer_kernels.gated import gated_activation
from tpformer_kernels.norm import rms_norm
from tpformer_kernels.rope import apply_rope

__all__ = ["apply_rope", "cross_entropy_gradient", "cross_entropy_statistics", "gated_activation", "rms_norm"]

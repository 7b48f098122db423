"""All initial weights of a model, in one table; bit for bit the same at any layout."""

import math

from torch import nn

from tpformer.layers.init import draw_normal
from tpformer.mesh import Mesh
from tpformer.placement import local_part, placements
from tpformer.random import Key


def init_weights(model: nn.Module, mesh: Mesh, *, seed: int, std: float, num_layers: int) -> None:
    """Give every parameter, or the rows of it that this replica holds (FSDP), its initial value.

        norm weights                        1
        biases                              0
        attention.out, mlp.down             N(0, (std / sqrt(2 num_layers))²), as GPT-2: they add to the residual
        every other matrix                  N(0, std²)

    Each matrix has a random stream of its own, named by the parameter, of which a rank draws its part only.
    """
    known = placements(model, mesh)
    for name, parameter in model.named_parameters():
        local = local_part(parameter.detach())
        if local.dim() == 1:
            local.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
        scale = std / math.sqrt(2 * num_layers) if residual else std
        draw_normal(local, known[name], Key(seed).fold("init", name), scale)

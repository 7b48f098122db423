"""tpformer: tensor-parallel Transformers that you can read, prove and run anywhere."""

# Hugging Face directories
from tpformer.checkpoint.huggingface import load_pretrained as load_pretrained
from tpformer.checkpoint.save import save_pretrained as save_pretrained

# building blocks
from tpformer.layers.attention import AttentionConfig as AttentionConfig
from tpformer.layers.attention import SelfAttention as SelfAttention
from tpformer.layers.block import DecoderBlock as DecoderBlock
from tpformer.layers.cross_entropy import vocab_parallel_cross_entropy as vocab_parallel_cross_entropy
from tpformer.layers.embedding import PositionEmbedding as PositionEmbedding
from tpformer.layers.embedding import VocabParallelEmbedding as VocabParallelEmbedding
from tpformer.layers.embedding import VocabParallelHead as VocabParallelHead
from tpformer.layers.linear import ColumnParallelLinear as ColumnParallelLinear
from tpformer.layers.linear import RowParallelLinear as RowParallelLinear
from tpformer.layers.linear_cross_entropy import (
    vocab_parallel_linear_cross_entropy as vocab_parallel_linear_cross_entropy,
)
from tpformer.layers.mlp import MLP as MLP
from tpformer.layers.mlp import GatedMLP as GatedMLP
from tpformer.layers.norm import LayerNorm as LayerNorm
from tpformer.layers.norm import RMSNorm as RMSNorm
from tpformer.layers.rope import RopeScaling as RopeScaling

# the layout
from tpformer.mesh import Axis as Axis
from tpformer.mesh import Mesh as Mesh

# models
from tpformer.models.generate import generate as generate
from tpformer.models.gpt import GPT as GPT
from tpformer.models.gpt import GPTConfig as GPTConfig
from tpformer.models.llama import Llama as Llama
from tpformer.models.llama import LlamaConfig as LlamaConfig
from tpformer.models.sampling import SamplingOptions as SamplingOptions

# an existing module
from tpformer.parallel.parallelize import parallelize as parallelize
from tpformer.parallel.plan import Style as Style

# sharding, open to inspection
from tpformer.parallel_config import ParallelConfig as ParallelConfig
from tpformer.placement import Piece as Piece
from tpformer.placement import Placement as Placement
from tpformer.placement import full_gradient as full_gradient
from tpformer.placement import full_parameter as full_parameter
from tpformer.placement import load_full_state as load_full_state
from tpformer.placement import placements as placements
from tpformer.placement import reduce_partial_gradients as reduce_partial_gradients

# what a layout will take
from tpformer.planner.search import Plan as Plan
from tpformer.planner.search import plan as plan

# random numbers, and the ledger of communication
from tpformer.random import Key as Key
from tpformer.trace import trace_communication as trace_communication

__version__ = "0.1.0"

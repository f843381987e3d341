"""DeepSeek-V3 in JAX: model, training and generation.

The alphabet of array names, one capital letter for each dimension:
B batch, T query position (tokens; B folded in where B is absent), S key position, D model,
V vocabulary, F ffn hidden, L stacked layers, N heads, H content head, R rotary head, A = H + R,
U value head, X = H + U, Q query latent, C kv latent, Y = C + R, Z = 2 D, E experts, G expert
groups, K experts per token, M rows of experts' matrices, J choices of tokens or places of experts,
P drafted tokens, W positions looked at together. A lower-case letter is that dimension in parts:
t a chunk of T, r pairs of R.
"""

from deepseek_jax import configs
from deepseek_jax.config import ModelConfig, Precision, Run, Schedule
from deepseek_jax.counts import param_counts
from deepseek_jax.generate import generate
from deepseek_jax.huggingface import load_huggingface, save_huggingface
from deepseek_jax.model import Aux, Model
from deepseek_jax.training import TrainState, init_state, make_train_step

__all__ = [
    "Aux",
    "Model",
    "ModelConfig",
    "Precision",
    "Run",
    "Schedule",
    "TrainState",
    "configs",
    "generate",
    "init_state",
    "load_huggingface",
    "make_train_step",
    "param_counts",
    "save_huggingface",
]

"""How devices communicate: the settings of NCCL and Gloo, and what a collective costs on this machine."""

from ryzanstein_jax.collectives.bandwidth import AlphaBeta as AlphaBeta
from ryzanstein_jax.collectives.bandwidth import bus_factor as bus_factor
from ryzanstein_jax.collectives.bandwidth import fit_alpha_beta as fit_alpha_beta

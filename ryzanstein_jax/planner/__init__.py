"""The planner: what a model takes and how fast it would be on devices that are not here."""

from ryzanstein_jax.planner.estimate import Plan as Plan
from ryzanstein_jax.planner.estimate import plan as plan
from ryzanstein_jax.planner.roofline import Step as Step
from ryzanstein_jax.planner.roofline import predict as predict

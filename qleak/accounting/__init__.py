"""ε of what was actually run."""

from qleak.accounting.accountants import (
    ADJACENCY,
    MECHANISMS,
    Epsilons,
    as_rate,
    both,
    claimed,
    epsilon,
    event,
    upper,
)
from qleak.accounting.gaussian import exact_epsilon, gaussian_mu, mu_of

__all__ = [
    "ADJACENCY",
    "MECHANISMS",
    "Epsilons",
    "as_rate",
    "both",
    "claimed",
    "epsilon",
    "event",
    "exact_epsilon",
    "gaussian_mu",
    "mu_of",
    "upper",
]

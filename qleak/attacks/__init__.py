"""Attacks: what an observer of the channel rebuilds."""

from qleak.attacks.adam import adam, sign_adam
from qleak.attacks.analytic import analytic
from qleak.attacks.cells import adaptive, cells, refine
from qleak.attacks.closed_form import closed_form
from qleak.attacks.cpl import cpl
from qleak.attacks.dlg import dlg, idlg
from qleak.attacks.halving import halving
from qleak.attacks.inverting import inverting_gradients, modern, see_through
from qleak.attacks.lbfgs import lbfgs
from qleak.attacks.local import any_order, one_gradient
from qleak.attacks.quick import quick
from qleak.attacks.reveal import reveal
from qleak.attacks.second_order import levenberg_marquardt

__all__ = [
    "adam", "adaptive", "analytic", "any_order", "cells", "closed_form", "cpl", "dlg", "halving", "idlg",
    "inverting_gradients", "lbfgs", "levenberg_marquardt", "modern", "one_gradient", "quick", "refine", "reveal",
    "see_through", "sign_adam",
]  # fmt: skip

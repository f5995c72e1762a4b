"""Attacks: what an observer of the channel rebuilds."""

from qleak.attacks.adam import adam, sign_adam
from qleak.attacks.cells import adaptive, cells, refine
from qleak.attacks.closed_form import closed_form
from qleak.attacks.dlg import dlg, idlg
from qleak.attacks.lbfgs import lbfgs

__all__ = ["adam", "adaptive", "cells", "closed_form", "dlg", "idlg", "lbfgs", "refine", "sign_adam"]

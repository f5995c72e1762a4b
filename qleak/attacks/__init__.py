"""Attacks: what an observer of the channel rebuilds."""

from qleak.attacks.adam import adam, sign_adam
from qleak.attacks.closed_form import closed_form
from qleak.attacks.lbfgs import lbfgs
from qleak.attacks.match import cells, dlg, idlg

__all__ = ["adam", "cells", "closed_form", "dlg", "idlg", "lbfgs", "sign_adam"]

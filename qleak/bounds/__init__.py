"""What no attacker can beat: upper bounds on reconstruction beside the attacks' lower bounds."""

from qleak.bounds.of import Bound, Setting, average, bound_of, sound
from qleak.bounds.prior import Prior, fitted, natural, public

__all__ = ["Bound", "Prior", "Setting", "average", "bound_of", "fitted", "natural", "public", "sound"]

"""DataLens on mnist: DRAFT.
"""

from qleak.plans import Synthesis
from qleak.plans.lens import lens, like


@like(dataset="mnist")
def datalens_mnist(**flags) -> Synthesis:
    """The plan."""
    return lens(**flags)

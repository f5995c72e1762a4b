"""DataLens on fashion_mnist: DRAFT.
"""

from qleak.plans import Synthesis
from qleak.plans.lens import lens, like


@like(dataset="fashion_mnist")
def datalens_fashion_mnist(**flags) -> Synthesis:
    """The plan."""
    return lens(**flags)

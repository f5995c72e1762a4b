"""DataLens on celeba-hair: DRAFT.
"""

from qleak.plans import Synthesis
from qleak.plans.lens import lens, like


@like(dataset="celeba-hair", size=16)
def datalens_celeba_hair(**flags) -> Synthesis:
    """The plan."""
    return lens(**flags)

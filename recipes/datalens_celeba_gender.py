"""DataLens on celeba-gender: DRAFT.
"""

from qleak.plans import Synthesis
from qleak.plans.lens import lens, like


@like(dataset="celeba-gender", size=16)
def datalens_celeba_gender(**flags) -> Synthesis:
    """The plan."""
    return lens(**flags)

"""DataLens on places365: DRAFT.
"""

from qleak.plans import Synthesis
from qleak.plans.lens import lens, like


@like(dataset="places365", size=16)
def datalens_places365(**flags) -> Synthesis:
    """The plan."""
    return lens(**flags)

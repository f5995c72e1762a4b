"""DataLens on places365: DRAFT.
"""

from qleak.plans import Synthesis
from qleak.plans.lens import lens, like


@like(dataset="places365", size=16, limit=20_000, test=4_000, teachers_batch=10, topk=20)
def datalens_places365(**flags) -> Synthesis:
    """The plan."""
    return lens(**flags)

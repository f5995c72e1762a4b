"""DataLens on celeba-gender: DRAFT.
"""

from qleak.plans import Synthesis
from qleak.plans.lens import lens, like


@like(dataset="celeba-gender", size=16, limit=20_000, test=4_000, teachers_batch=10, topk=20)
def datalens_celeba_gender(**flags) -> Synthesis:
    """The plan."""
    return lens(**flags)

"""DataLens on CelebA by hair colour (black, blond, brown), reduced to 16×16 pixels and 1,000 teachers; not measured.

The flags are those of the published command line (docs/synthesis.md); `--full` is its size, for a GPU. Tested on small generated
images in the set's true layout.
"""

from qleak.plans import Synthesis
from qleak.plans.lens import lens, like


@like(dataset="celeba-hair", size=16, limit=20_000, test=4_000, teachers_batch=10, topk=20)
def datalens_celeba_hair(**flags) -> Synthesis:
    """The plan."""
    return lens(**flags)

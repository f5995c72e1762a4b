"""DataLens on Fashion-MNIST at exact ε = 1, reduced to 8×8 pixels: 4,000 teachers, top-5 stochastic signs.

The flags are those of the published command line (docs/synthesis.md); `--full` is its command, 28×28 with DCGANs, for a GPU.

Measured (50 steps of ten images, a perceptron on 10,000 samples, last epoch, 5 seeds): top-5 signs 54.5 %, vectors of length 1
without compression 59.1 %, no privacy 58.7 %; the floor, one noisy average, 63.6 %.

Claims:
    top-k stochastic sign synthesis accuracy >= 0.45
    unit length, no compression synthesis accuracy >= 0.52
    unit length, no compression synthesis epsilon <= 1
"""

from qleak.plans import Synthesis
from qleak.plans.lens import lens, like


@like(dataset="fashion_mnist")
def datalens_fashion_mnist(**flags) -> Synthesis:
    """The plan."""
    return lens(**flags)

"""The 2020 attack on a digit: the exact gradient of an untrained LeNet, one image of MNIST.

Zhao, Mopuri, Bilen (2020): the label is read off the last layer's gradient first, then the image is optimised with it
fixed, from standard normal noise. The net is the papers' LeNet with weights U(−0.5, 0.5).

Measured (image 25, one start, 60×20 closures): 76 dB.

Claims:
    fp32 idlg psnr_selected >= 40
    fp32 idlg label_accuracy >= 0.99
"""

from qleak.attacks import dlg, idlg
from qleak.plans import Audit
from qleak.plans.victims import single


def idlg_mnist(
    index: str = "25",
    image: str = "",
    label: int = 0,
    data: str = "mnist",
    outer: int = 60,
    restarts: int = 1,
    both: bool = False,
    full: bool = False,
) -> Audit:
    """The plan.

    Args:
        index: the image attacked, or first:last for a range (the last left out). More than 20 images are attacked
            without controls, 32 lanes at a time.
        image: a picture file in place of the data set, cropped to a square and scaled to 28×28 grey.
        label: the picture's class, in 0 … 9: no file says what it shows, and the client's gradient needs one.
        data: another set; the net takes its shape and its number of classes.
        outer: outer iterations of L-BFGS, 20 closures each.
        restarts: random starts on each image.
        both: run the 2019 attack beside it, on the same gradients.
        full: the paper's 300 outer iterations.
    """
    outer = 300 if full else outer
    attacks = (idlg(outer=outer), dlg(outer=outer)) if both else (idlg(outer=outer),)
    return single(attacks, data, index, image, label, restarts, shape=(1, 28, 28), classes=10, instead="mnist5k")

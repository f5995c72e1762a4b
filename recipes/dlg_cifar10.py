"""The 2019 attack on a small colour picture: the exact gradient of an untrained LeNet, one image of CIFAR-10.

Zhu, Liu, Han (NeurIPS 2019): image and soft label are optimised together, from standard normal noise, until their
gradient is the one that was shared. The net is the papers' LeNet with weights U(−0.5, 0.5) and ten classes.

Measured (the first sixteen photographs, one start each, 60×20 closures): dlg has 18.9 dB on average and rebuilds 9 of
16, idlg 19.2 dB and 8; every label is found.

Claims (--data cifar10-12k --index 0:16 --both):
    fp32 dlg psnr_selected >= 17
    fp32 idlg psnr_selected >= 17
    fp32 idlg label_accuracy >= 0.99
"""

from qleak.attacks import dlg, idlg
from qleak.plans import Audit
from qleak.plans.victims import single


def dlg_cifar10(
    index: str = "25",
    image: str = "",
    label: int = 0,
    data: str = "cifar10",
    outer: int = 60,
    restarts: int = 1,
    both: bool = False,
    full: bool = False,
) -> Audit:
    """The plan.

    Args:
        index: the image attacked, or first:last for a range (the last left out). More than 20 images are attacked
            without controls, 32 lanes at a time.
        image: a picture file in place of the data set, cropped to a square and scaled to 32×32 colour.
        label: the picture's class, in 0 … 9: no file says what it shows, and the client's gradient needs one.
        data: another set, such as cifar10-12k; the net takes its shape and its number of classes.
        outer: outer iterations of L-BFGS, 20 closures each.
        restarts: random starts on each image.
        both: run the 2020 attack beside it, on the same gradients.
        full: the paper's 300 outer iterations.
    """
    outer = 300 if full else outer
    attacks = (dlg(outer=outer), idlg(outer=outer)) if both else (dlg(outer=outer),)
    return single(
        attacks, data, index, image, label, restarts, shape=(3, 32, 32), classes=10, instead="photos --index 0"
    )

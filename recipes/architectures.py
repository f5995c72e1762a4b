"""Width, depth or sheer number of parameters: which property of a net makes its gradients give images back?

Three families, each of which moves one of them: convolutional nets of one depth and growing width, of one width and
growing depth, and nets with one hidden layer that grows. Width and depth bring parameters with them, so each family is to
be read beside the column of parameters. The images and the attack are the same throughout.

Measured (4 digits, fresh weights, one start): width helps and depth hinders, a little. Convolutions of 2, 4, 12, 24
channels give 24, 82, 106, 106 dB; two, three, four, six of them 119, 106, 106, 95 dB. The number of parameters decides
nothing by itself: a perceptron with four hidden units and 3,190 parameters gives 150 dB, one with 64 times as many 141, a
convolutional net with 2,882 gives 82. Only the narrowest net (1,246 parameters for 784 pixels) loses an image.

Claims:
    width-2 fp32 cells psnr_selected <= 50
    width-12 fp32 cells psnr_selected >= 80
    depth-6 fp32 cells psnr_selected >= 70
    hidden-4 fp32 cells psnr_selected >= 100
    hidden-256 fp32 cells psnr_selected >= 100
"""

from qleak.catalog import build, several
from qleak.check import at_least, whole
from qleak.data import load
from qleak.plans import Audit, Study
from qleak.plans.victims import numbers, spread


def architectures(
    widths: str = "2,4,12,24",
    depths: str = "2,3,4,6",
    hidden: str = "4,16,64,256",
    images: int = 4,
    data: str = "mnist5k",
    function: str = "sigmoid",
    init: str = "wide",
    channels: str = "chain()",
    restarts: int = 1,
    attacks: str = "all",
    full: bool = False,
) -> Study:
    """The plan.

    Args:
        widths: channels of every convolution of a net with three.
        depths: numbers of convolutions of twelve channels.
        hidden: units of the hidden layer of a perceptron.
        images: images attacked, spread over the set.
        data: a data set of square images.
        function: activation, the same everywhere.
        init: weights of the convolutional nets, "wide" or "default".
        channels: channels separated by ";".
        restarts: random starts on each image.
        attacks: "all", or attacks separated by ";".
        full: 32 images, 8 restarts.
    """
    whole(images=images)
    at_least(1, images=images)
    found = load(data)
    c, size, _ = found.x.shape[1:]
    base = f"channels={c}, size={size}, classes={found.classes}, function={function!r}"
    nets = {f"width-{w}": f"lenet({base}, width={w}, init={init!r})" for w in numbers(widths, "widths")}
    nets |= {f"depth-{d}": f"deep_lenet({base}, depth={d}, init={init!r})" for d in numbers(depths, "depths")}
    nets |= {f"hidden-{h}": f"mlp({base}, hidden=({h},))" for h in numbers(hidden, "hidden")}
    parts = [
        Audit(
            model=build("models", net),
            data=data,
            victims=spread(len(found.x), 1, 32 if full else images),
            channels=several("channels", channels, ("chain()",)),
            attacks=several("attacks", attacks, ("cells()",)),
            restarts=8 if full else restarts,
            wrong=1,
            chunk=4,
        )
        for net in nets.values()
    ]
    return Study(tuple(nets), tuple(parts))

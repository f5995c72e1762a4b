"""Labels leak first: of one image always, of a batch how often each class is in it, through 256 levels as well.

No image is rebuilt: every rule of `qleak.attacks.labels` reads the last layer's gradient of an untrained net and hands
in labels. `label_accuracy` counts single labels, `counts_exact` batches whose counts are all right. Images of a batch
follow each other in the data set, so batches are taken from sets in mixed order; `mnist5k`, the default for one image,
is sorted by class.

Measured (100 single digits, untrained sigmoid LeNet): every rule finds every label on exact gradients and on 256, 16 and 4
levels. Batches: docs/labels.md.

Claims:
    fp32 reveal label_accuracy >= 0.99
    uniform(levels=16) reveal label_accuracy >= 0.99
    uniform(levels=4) reveal label_accuracy >= 0.95
"""

from qleak.attacks import reveal
from qleak.attacks.labels import RULES
from qleak.catalog import several
from qleak.check import at_least, whole
from qleak.client import gradient
from qleak.plans import Audit
from qleak.plans.victims import fitting, mixed, spread

CHANNELS = (
    "chain()",
    "chain(uniform(levels=256))",
    "chain(uniform(levels=16))",
    "chain(uniform(levels=4))",
    "chain(sign())",
    "chain(gaussian(sigma=0.01, unbounded=True))",
)


def label_inference(
    data: str = "auto",
    model: str = "auto",
    batch: int = 1,
    victims: int = 100,
    channels: str = "chain(); chain(uniform(levels=256)); chain(uniform(levels=16)); chain(uniform(levels=4))",
    rules: str = "all",
    full: bool = False,
) -> Audit:
    """The plan.

    Args:
        data: a data set; "auto" is `mnist5k` for one image and `mnist`, which is in mixed order, for batches.
        model: a model of `qleak ls models`, or run:ID; "auto" is the first papers' LeNet in the set's shape.
        batch: images of one update.
        victims: so many updates, spread over the set.
        channels: "all", or channels separated by ";".
        rules: "all", or rules of `qleak.attacks.labels` separated by ";".
        full: 1,000 victims.
    """
    whole(batch=batch, victims=victims)
    at_least(1, batch=batch, victims=victims)
    data = data if data != "auto" else "mnist5k" if batch == 1 else "mnist"
    net, count = fitting(model, data)
    places = spread(count, batch, 1000 if full else victims)
    if batch > 1:
        mixed(data, places, batch)
    return Audit(
        model=net,
        data=data,
        victims=places,
        channels=several("channels", channels, CHANNELS),
        attacks=tuple(reveal(r.strip()) for r in (("auto", *RULES) if rules == "all" else rules.split(";"))),
        client=gradient(batch),
        controls=0,
        chunk=100,
    )

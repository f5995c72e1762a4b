"""Which images a recipe attacks: one by its index, a range of them, a picture of one's own, batches over a set."""

from __future__ import annotations

from collections.abc import Sequence

from qleak import data as sets
from qleak.catalog import build
from qleak.channels import identity
from qleak.check import Expected, at_least, whole
from qleak.data import called
from qleak.data.picture import digest_of
from qleak.data.sets import SETS
from qleak.plans.audit import Audit
from qleak.types import Attack, Model

MANY = 20  # victims beyond which an experiment of the first papers runs no controls, and wider chunks
LENET = "lenet(channels={}, size={}, classes={})"


def indices(text: str, count: int, data: str) -> tuple[int, ...]:
    """The images that "25" or "0:1000" (first:last, the last left out) name in a set of `count`.

    Raises:
        Expected: neither form, an empty range, or an image that the set does not have.
    """
    first, colon, last = (part.strip() for part in text.partition(":"))
    if not first.isdecimal() or (colon and not last.isdecimal()):
        raise Expected(f"Expected index {text!r} as one number or as first:last, such as 25 or 0:1000.")
    start, stop = int(first), int(last) if colon else int(first) + 1
    if start >= stop:
        raise Expected(f"Expected index {text!r} to begin before it ends: the last one is left out.")
    if stop > count:
        raise Expected(f"Expected index {stop - 1} in 0 … {count - 1} of data {data!r}.")
    return tuple(range(start, stop))


def single(
    attacks: Sequence[Attack],
    data: str,
    index: str = "25",
    image: str = "",
    label: int = 0,
    restarts: int = 1,
    shape: tuple[int, int, int] = (3, 32, 32),
    classes: int = 10,
    instead: str = "",
) -> Audit:
    """The experiment of the first papers: single images, exact gradients, their LeNet with weights U(−0.5, 0.5).

    More than 20 images are attacked without controls, in chunks of 32 lanes.

    Args:
        attacks: who looks at each gradient.
        data: a data set; the net takes its shape and its number of classes.
        index: see `indices`.
        image: a picture file in place of the set, cropped and scaled to `shape`.
        label: its class, of `classes`: no file says what it shows.
        restarts: random starts on each image.
        shape: (c, h, w) of the net for a picture, and the size of sets of image files (at h×w).
        classes: of the net for a picture.
        instead: a set that can be named where `data` is not at hand.

    Raises:
        Expected: the set is not at hand, an index outside it, or a label outside the classes.
    """
    if image:
        whole(label=label)
        if not 0 <= label < classes:
            raise Expected(f"Expected label={label} in 0 … {classes - 1}, the classes of the net.")
        options = {"path": image, "size": shape[1], "channels": shape[0], "label": label, "digest": digest_of(image)}
        data, victims = called.written("picture", **options), (0,)
        sets.load(data)
    else:
        if label:
            raise Expected(f"Expected label={label} together with an image file: data {data!r} has its own labels.")
        data, shape, classes, victims = _of_set(data, index, shape[1], instead)
    many = len(victims) > MANY
    return Audit(
        model=build("models", LENET.format(shape[0], shape[1], classes)),
        data=data,
        victims=victims,
        channels=(identity(),),
        attacks=tuple(attacks),
        restarts=restarts,
        controls=0 if many else 1,
        chunk=32 if many else 16,
    )


def _of_set(data: str, index: str, size: int, instead: str) -> tuple[str, tuple[int, int, int], int, tuple[int, ...]]:
    """The set's text, shape, number of classes and the victims in it; of image files only what is needed is decoded."""
    said = data
    if data in SETS and SETS[data].sized:
        last = indices(index, 2**62, data)[-1]
        data = called.written(data, size=size, limit=last + 1)
    try:
        images = sets.load(data)
    except Expected as error:
        hint = f" `--data {instead}` needs no download." if instead and said in SETS else ""
        raise Expected(f"{error}{hint}") from None
    victims = indices(index, len(images.x), said)
    channels, height, width = images.x.shape[1:]
    return data, (channels, height, width), images.classes, victims


def spread(count: int, size: int, number: int) -> tuple[int, ...]:
    """Where `number` blocks of `size` images begin, evenly over a set of `count`: a sorted one gives every class its turn.

    Raises:
        Expected: more images are asked for than there are.
    """
    whole(size=size, number=number)
    at_least(1, size=size, number=number)
    if number * size > count:
        raise Expected(f"Expected {number} × {size} images of a set that has them, got one of {count}.")
    return tuple(i * count // number for i in range(number))


def cut(blocks: Sequence[int], size: int, batch: int) -> tuple[int, ...]:
    """The batches of `batch` that blocks of `size` images hold: the same images, whatever the batch size.

    Raises:
        Expected: `batch` does not divide `size`.
    """
    if size % batch:
        raise Expected(f"Expected batches of {batch} that fill blocks of {size} images.")
    return tuple(block + i for block in blocks for i in range(0, size, batch))


def numbers(text: str, name: str) -> tuple[int, ...]:
    """What "1,2,4" lists: whole numbers above 0, each once, ascending.

    Raises:
        Expected: anything else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise Expected(f"Expected {name}={text!r} as whole numbers above 0, separated by commas.")
    return tuple(sorted({int(part) for part in parts}))


def fitting(model: str, data: str) -> tuple[Model, int]:
    """The model by name ("auto": the first papers' LeNet in the set's shape), and how many images the set has.

    Raises:
        Expected: the set is not at hand, or does not fit the model.
    """
    images = sets.load(data)
    channels, size, _ = shape = tuple(images.x.shape[1:])
    net = build("models", LENET.format(channels, size, images.classes) if model == "auto" else model)
    if net.shape != shape or net.classes < images.classes:
        raise Expected(
            f"Expected data {data!r} of shape {net.shape} and at most {net.classes} classes for this model, "
            f"got {shape} and {images.classes}."
        )
    return net, len(images.x)


def mixed(data: str, places: Sequence[int], batch: int) -> None:
    """Refuses a set whose batches are mostly of one class: counting one class shows nothing.

    Raises:
        Expected: more than half of the batches hold a single class.
    """
    y = sets.load(data).y
    alone = sum(bool((y[i : i + batch] == y[i]).all()) for i in places)
    # Two images agree by chance now and then; half of the batches do only where the set is sorted.
    if alone > len(places) / 2:
        raise Expected(
            f"Expected data={data!r} in mixed order for batches of {batch}: {alone} of {len(places)} hold one class. "
            "Try mnist, fashion_mnist or cifar10-12k."
        )

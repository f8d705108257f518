"""What data are: are they fit to learn from, and are they those of before?

Checkpoints and config.json of a run hold the names of its classes, the counts of each, and
fingerprints of its images and labels. infoard.load_dataset asks for facts by name.
"""

import hashlib

import torch
from torch import Tensor, nn

import infoard as I
from companions import options

# ==== 1. One data set =============================================================================


def sha256_of(x: Tensor) -> str:
    """That of the values of a tensor, whatever their layout in memory."""
    if x.dim() == 4:
        x = x.permute(0, 2, 3, 1)  # as images mostly lie
    return hashlib.sha256(x.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


def check_data(name: str, data: I.Data) -> None:
    """One line for data that no net can learn from."""
    told = f"the data set {name}"
    I.require(isinstance(data, I.Data), f"{told} is a {type(data).__name__}, no infoard.Data")
    I.require(len(data.classes) > 1, f"{told} has one class: nothing to tell apart")
    parts = {"train": (data.x_train, data.y_train), "test": (data.x_test, data.y_test)}
    for part, (x, y) in parts.items():
        told = f"the data set {name}: x_{part}"
        tensors = isinstance(x, Tensor) and isinstance(y, Tensor)
        I.require(tensors, f"{told} and y_{part} must be tensors: torch.from_numpy makes them")
        shape = list(x.shape)
        I.require(x.dim() == 4 and shape[1] == 3 and shape[0], f"{told} is {shape}, not [N,3,H,W]")
        I.require(y.dim() == 1, f"{told}: y_{part} is {list(y.shape)}, not [N]")
        I.require(len(x) == len(y), f"{told} are {len(x)} images, y_{part} {len(y)} labels")
        byte = x.dtype == torch.uint8
        in_box = byte or (x.dtype == torch.float32 and 0 <= x.min() <= x.max() <= 1)
        I.require(in_box, f"{told} must be uint8, or float32 in [0, 1]")
        known = y.dtype == torch.long and 0 <= y.min() <= y.max() < len(data.classes)
        told = f"the data set {name}: y_{part} must be long, in 0 to {len(data.classes) - 1}"
        I.require(known, f"{told} as there are {len(data.classes)} names of classes")
    sizes = [list(x.shape[1:]) for x, _ in parts.values()]
    told = f"the data set {name}: training images are {sizes[0]}, test images {sizes[1]}"
    I.require(sizes[0] == sizes[1], told)


def facts(name: str, data: I.Data) -> dict:
    """Counts per class and fingerprints of a data set, for checkpoints; of the built-in nothing.
    Names of its classes are made words.

    The fingerprint of a folder is that of its files, of others that of their pixels.
    """
    if name == "shapes":
        return {}
    check_data(name, data)
    data.classes = [str(of_class) for of_class in data.classes]  # numpy's are no JSON
    sums = data.about.get("files_sha256")
    if sums is None:
        sums = [sha256_of(data.x_train), sha256_of(data.x_test)]
    about = {}
    for part, x_sum, y in zip(("train", "test"), sums, (data.y_train, data.y_test), strict=True):
        about[part] = torch.bincount(y, minlength=len(data.classes)).tolist()
        text = x_sum + sha256_of(y)
        about[f"{part}_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return about


def described(data: I.Data) -> dict:
    """The facts of data, and the names of their classes."""
    return {"classes": data.classes, **data.about}


# ==== 2. Two data sets ============================================================================


def of_names(names: list) -> str:
    """The first of some names of classes."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(map(str, names[:4])) + more


def other_classes(old: list, new: list) -> str:
    """How names of classes differ, in words; nothing if they are the same or not known."""
    old = [str(name) for name in old]  # once kept as they were given
    new = [str(name) for name in new]
    if not old or old == new:
        return ""
    if sorted(old) == sorted(new):
        return f"the same classes in another order ({of_names(old)}, now {of_names(new)})"
    gone = [name for name in old if name not in new]
    came = [name for name in new if name not in old]
    only = [f"only then: {of_names(gone)}"] if gone else []
    only += [f"only now: {of_names(came)}"] if came else []
    return f"{len(old)} classes, not these {len(new)} ({'; '.join(only)})"


def difference(old: dict, new: dict) -> str:
    """How the data of before differ from those of now, in words; nothing if they do not."""
    why = other_classes(old.get("classes", []), new.get("classes", []))
    if why:
        return why
    for part, name in (("train", "training"), ("test", "test")):
        before, now = old.get(part), new.get(part)
        if before and now and before != now:
            if sum(before) != sum(now):
                return f"{sum(before)} {name} images, not {sum(now)}"
            return f"{name} images that belong to other classes"
        before, now = old.get(f"{part}_sha256"), new.get(f"{part}_sha256")
        if before and now and before != now:
            return f"other {name} images"
    before, now = old.get("extra_sha256"), new.get("extra_sha256")
    if before and now and before != now:
        return "other generated images"
    return ""


def same_classes(path: str, net: nn.Module, data: I.Data) -> None:
    """One line, if a net of this program knows other classes than the data; other data are told."""
    known = getattr(net, "trained_on", {})
    why = other_classes(known.get("classes", []), data.classes)
    told = f"{path} was trained on {why}: it is not for these data (if names alone differ:"
    bare = options.command("export", path)
    I.require(not why, f"{told} {bare} leaves bare weights without them)")
    size = data.x_test.shape[-1]
    if known.get("size", size) != size:
        told = f"warning: {path} was trained on images of {known['size']} pixels, not {size}"
        print(f"{told}: --image-size {known['size']} is what it knows")
    why = difference(known, described(data))
    if why and "test images" in why:
        print(f"note: the run of {path} had {why}")
    elif why:
        print(f"note: {path} was trained on {why}")

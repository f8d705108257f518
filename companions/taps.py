"""Which modules of a net InfoARD compares, of any net: stages, not what is inside of blocks.

    python companions/taps.py [results/taps/README.md]    the table of nets and their taps
    print(describe(InfoARD(student, teacher)))            the pairs of two nets

    1  features    2  stages    3  the table

infoard.Taps asks for find_taps and as_features by name. Alone it takes the children of a net, which
is the same for the nets that are built into infoard.py.
"""

import math
from functools import partial

from torch import Tensor, nn

import infoard as I

# ==== 1. Features =================================================================================


def in_proportion(height: int, width: int, x: Tensor) -> bool:
    """Whether a grid may be one of images x, whose sides are halved and rounded again and again."""
    return abs(height * x.shape[3] - width * x.shape[2]) < min(x.shape[2:])


def token_grid(f: Tensor, x: Tensor) -> Tensor:
    """Tokens [B,n+h*h,C] of square images as [B,C,h,h]; without a grid their mean, [B,C].

    The first n <= 8 are those of the class and registers, which have no place in the image.
    """
    side = math.isqrt(f.shape[1])
    if x.shape[2] != x.shape[3] or side == 1 or f.shape[1] - side**2 > 8:
        return f.mean(1)
    return f[:, -(side**2) :].unflatten(1, (side, side)).movedim(3, 1)


def as_features(f, x: Tensor) -> Tensor | None:
    """What a module gives of images x as [B,C,h,w] or [B,C], or None if it is of no known kind.

    Known: [B,C,h,w], [B,h,w,C], tokens [B,N,C], vectors [B,C], and the first of a tuple. Attention
    of h heads, [B,h,N,d], is in no proportion to the image.
    """
    if isinstance(f, tuple) and f:
        f = f[0]
    if not isinstance(f, Tensor) or f.dim() not in (2, 3, 4) or len(f) != len(x):
        return None
    if f.dim() == 2:
        return f
    if f.dim() == 3:
        return token_grid(f, x)
    if in_proportion(f.shape[2], f.shape[3], x):
        return f
    if in_proportion(f.shape[1], f.shape[2], x):
        return f.movedim(3, 1)
    return None


# ==== 2. Stages ===================================================================================


class Calls:
    """The calls of modules in one pass of a net on x, in the order in which they end.

    What is called inside of a block or a stage, a module that changes the resolution once or never,
    is left out: at the resolution where it begins it has nothing finished.
    """

    def __init__(self, net: nn.Module, x: Tensor):
        self.x = x
        self.ended = []  # (name, h*w of its map or 0, whether it is a head)
        self.begun = []  # for each module at work, how many calls had ended when it began
        self.names = []  # of all calls
        hooks = []
        for name, module in net.named_modules():
            if name:
                hooks.append(module.register_forward_pre_hook(self.begin))
                hooks.append(module.register_forward_hook(partial(self.end, name)))
        try:
            I.predict(net, x)
        finally:
            for hook in hooks:
                hook.remove()

    def area(self, f) -> int:
        """The resolution h*w of a map, 0 of anything else."""
        features = as_features(f, self.x)
        if features is None or features.dim() < 4:
            return 0
        return features[0, 0].numel()

    def begin(self, module: nn.Module, inputs: tuple) -> None:
        self.begun.append(len(self.ended))

    def end(self, name: str, module: nn.Module, inputs: tuple, output) -> None:
        first = self.begun.pop()
        entered = inputs[0] if inputs else None
        before, after = self.area(entered), self.area(output)
        between = [size for _, size, _ in self.ended[first:] if after < size < before]
        if after and not between:
            del self.ended[first:]
        self.names.append(name)
        is_head = isinstance(module, nn.Linear) and entered.dim() == 2
        if getattr(output, "shape", None) != self.x.shape:  # x with other values is no feature
            self.ended.append((name, after, is_head))


def find_taps(net: nn.Module, x: Tensor) -> dict[str, str]:
    """{tap: module}: the last map at each resolution, shallow to deep, and as "penultimate" the
    last linear layer, whose input is meant.

    Not taken: a module that is called twice, since a hook tells its outputs by its name, and a map
    that is larger than one before it.
    """
    calls = Calls(net, x)
    stages = {}  # {h*w: module}
    found = {}
    smallest = math.inf
    for name, size, is_head in calls.ended:
        if is_head:
            found["penultimate"] = name
        elif 0 < size <= smallest:
            smallest = size
            if size > 1 and calls.names.count(name) == 1:
                stages[size] = name
    return {name: name for name in stages.values()} | found


def describe(info: I.InfoARD) -> str:
    """A line for each pair of modules that InfoARD compares, with the shapes of their features."""
    if not info.weights:
        return "InfoARD compares no features"
    lines = []
    for name_s, name_t in info.pairs:
        shape_s = info.student_taps.shapes[name_s]
        shape_t = info.teacher_taps.shapes[name_t]
        lines.append(f"compared: {name_s} {shape_s} of the student, {name_t} {shape_t}")
    return "\n".join(lines)

"""Which modules of a net InfoARD compares, of any net: stages, not what is inside of blocks.

    python -m companions.taps results/taps/README.md      the table of nets and their taps
    print(describe(InfoARD(student, teacher)))            the pairs of two nets

    1  features    2  stages    3  the table

infoard.Taps asks for find_taps and as_features by name. Alone it takes the children of a net, which
is the same for the nets that are built into infoard.py.
"""

import math
import sys
from functools import partial
from pathlib import Path

import torch
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
        return f.clone() if f.is_inference() else f  # of inference_mode, autograd takes copies
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
            with torch.compiler.set_stance("force_eager"):
                I.predict(net, x)
        except Exception as error:  # whatever foreign code raises
            why = " ".join(str(error).split())[:200] or type(error).__name__
            told = f"the net takes no images {list(x.shape[1:])}: name theirs by image_shape"
            raise I.InfoardError(f"{told}; {why}") from None
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
        if (after and not between) or isinstance(
            output, list
        ):  # of parallel branches, such as HRNet
            del self.ended[first:]
        self.names.append(name)
        flat = isinstance(entered, Tensor) and entered.dim() == 2  # given by place, not by name
        is_head = isinstance(module, nn.Linear) and flat
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
        text = f"{name_s} {shape_s} of the student, {name_t} {shape_t} of the teacher"
        lines.append(f"compared: {text}")
    return "\n".join(lines)


# ==== 3. The table ================================================================================

SIZES = {"inception_v3": 299}  # pixels, where a net is not for 224
TORCHVISION = (
    "resnet18 resnet50 vgg16_bn mobilenet_v2 mobilenet_v3_small efficientnet_b0 densenet121 "
    "regnet_y_400mf convnext_tiny swin_t swin_v2_t vit_b_16 maxvit_t shufflenet_v2_x0_5 mnasnet0_5 "
    "squeezenet1_1 googlenet inception_v3"
).split()
TIMM = (
    "resnet18 resnetv2_50 wide_resnet50_2 efficientnet_b0 mobilenetv3_small_100 convnext_atto "
    "densenet121 vgg11 regnety_002 swin_tiny_patch4_window7_224 vit_tiny_patch16_224 "
    "vit_small_patch14_reg4_dinov2 deit_tiny_distilled_patch16_224 mixer_s32_224 levit_128s "
    "mobilevit_xxs pvt_v2_b0 coatnet_0_rw_224 xcit_nano_12_p16_224 hrnet_w18_small"
).split()
HERE = ("tiny", "resnet18", "preact_resnet18", "wrn_10_2", "mobilenet_v2")


def torchvision_net(name: str) -> nn.Module:
    """A net of torchvision with random weights."""
    from torchvision import models

    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, num_classes=10, **options)


def timm_net(name: str) -> nn.Module:
    """A net of timm with random weights."""
    import timm

    return timm.create_model(name, num_classes=10)


LIBRARIES = {  # {library: (how a net of it is made, names)}
    "infoard": (I.build_model, HERE),
    "torchvision": (torchvision_net, TORCHVISION),
    "timm": (timm_net, TIMM),
}
HEAD = """# What InfoARD compares in nets of other people

Made by `python -m companions.taps results/taps/README.md` (torchvision and timm installed), with
random weights. `InfoARD` compares the input of the last linear layer and up to three of the maps,
the deepest with the deepest; `taps="layer4=norm,layer3=blocks.5"` (`--taps`) names others, the
student's = the teacher's. Maps are given as channels x height x width, also where a net has them
channels last (Swin) or as tokens (ViT, without those of the class and registers). Nothing inside of
a block is taken; attention maps and outputs of the shape of the image are left out. `-`: there is
no last linear layer, and maps alone are compared.

| from | net | pixels | maps, shallow to deep | penultimate |
|---|---|---|---|---|
"""


def row_of(library: str, name: str) -> str:
    """A line of the table: what is tapped in a net."""
    make, _ = LIBRARIES[library]
    net = make(name)
    size = 32 if library == "infoard" else SIZES.get(name, 224)
    if library == "timm":
        size = net.default_cfg["input_size"][-1]
    shapes = I.Taps(net, torch.zeros(2, 3, size, size)).shapes
    texts = {tap: "x".join(str(side) for side in shape) for tap, shape in shapes.items()}
    head = texts.pop("penultimate", "-")
    maps = [f"`{tap}` {text}" for tap, text in texts.items()]
    return f"| {library} | {name} | {size} | {', '.join(maps) or '-'} | {head} |\n"


def main(out: str = "results/taps/README.md") -> None:
    """Writes the table."""
    text = HEAD
    for library, (_, names) in LIBRARIES.items():
        for name in names:
            print(library, name, flush=True)
            text += row_of(library, name)
    I.save(Path(out), text.encode())


if __name__ == "__main__":
    main(*sys.argv[1:])

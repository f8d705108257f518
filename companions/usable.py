"""What is evaluated, made usable or refused in one line: images, labels, nets as people bring them.

infoard.evaluate hands over what it was given and goes on with what comes back. An ordinary net, one
with parameters that maps float32 images [B,C,H,W] to logits [B,K], comes back as it is.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

import infoard as I

ROUNDING = 1e-3  # outside of [0,1] by as much is a rounding, of float16 or of a resizing: clamped


# ==== 1. Images and labels ========================================================================


def as_tensor(values, what: str) -> Tensor:
    """An array or a list as a tensor."""
    if isinstance(values, Tensor):
        return values
    try:
        return torch.as_tensor(np.asarray(values))
    except (TypeError, ValueError):
        raise I.InfoardError(f"{what} must be a tensor, not a {type(values).__name__}") from None


def as_images(x) -> Tensor:
    """Images [N,C,H,W], uint8 or floating in [0,1]; a rounding outside is clamped."""
    x = as_tensor(x, "images")
    I.require(x.dim() == 4, f"images must be [N,C,H,W], not {list(x.shape)}")
    channels_last = x.shape[1] == x.shape[2] > 4 and x.shape[3] in (1, 3)
    told = f"images must be [N,C,H,W], not {list(x.shape)}: x.permute(0, 3, 1, 2)"
    I.require(not channels_last, told)
    if x.dtype == torch.uint8 or not len(x):
        return x
    told = f"images are {x.dtype}: give uint8 from 0 to 255, or floats in [0, 1]"
    I.require(x.is_floating_point(), told)
    low, high = x.min().item(), x.max().item()
    told = f"images reach from {low:.4g} to {high:.4g}, not over [0, 1]: normalise inside the model"
    I.require(-ROUNDING <= low and high <= 1 + ROUNDING, told)
    return x if 0 <= low and high <= 1 else x.clamp(0, 1)


def as_labels(y, n: int) -> Tensor:
    """Labels, long [N], of whole numbers of any type, [N] or [N,1]."""
    y = as_tensor(y, "labels")
    if y.dim() == 2 and y.shape[1] == 1:
        y = y.squeeze(1)
    told = f"labels must be [N], not {list(y.shape)}: of one-hot ones take y.argmax(1)"
    I.require(y.dim() == 1, told)
    I.require(len(y) == n, f"there are {n} images and {len(y)} labels")
    whole = y.long()
    I.require((whole == y).all(), "labels must be whole numbers, from 0 to K - 1")
    I.require((whole >= 0).all(), "labels must be 0 to K - 1: there are negative ones")
    return whole


# ==== 2. Nets =====================================================================================


def logits_of(output) -> Tensor:
    """The logits in what a net gives: a tensor, the first of several, or those called logits."""
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, (tuple, list)) and output:
        return output[0]
    return output


class Adapted(nn.Module):
    """A net, or any function of images, as one that has a parameter and gives logits alone.

    dtype: in which it computes. It gets images in the usual order in memory.
    """

    def __init__(self, net: Callable, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.net = net
        self.dtype = dtype
        self.place = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return logits_of(self.net(x.to(self.dtype).contiguous()))


def first_float(net) -> Tensor | None:
    """A floating parameter or buffer of a net, if it has one."""
    if not isinstance(net, nn.Module):
        return None
    for value in [*net.parameters(), *net.buffers()]:
        if value.is_floating_point():
            return value
    return None


def tried(net: Callable, x: Tensor):
    """(what a net gives of a few images, or None; why it failed, or "")."""
    try:
        with torch.no_grad(), I.frozen_eval(net):
            return net(x), ""
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever foreign code raises
        return None, " ".join(str(error).split())[:300] or type(error).__name__


def is_ordinary(net, output) -> bool:
    """Whether a net needs no help: it has parameters and gives floats [B,K]."""
    has_parameters = isinstance(net, nn.Module) and any(True for _ in net.parameters())
    return has_parameters and isinstance(output, Tensor)


def check_logits(z, x: Tensor, y: Tensor) -> None:
    """One line, unless z is logits [B,K] of x and y are among its classes."""
    told = f"the net gives a {type(z).__name__}, not logits [B,K]: wrap it in a net that does"
    I.require(isinstance(z, Tensor) and z.is_floating_point(), told)
    told = f"the net gives {list(z.shape)} for {len(x)} images, not logits [{len(x)},K]"
    I.require(z.dim() == 2 and len(z) == len(x), told)
    most, classes = int(y.max()), z.shape[1]
    I.require(most < classes, f"labels reach {most}, but the net has {classes} classes (0 first)")
    I.require(classes > 1, "the net has one class: nothing to tell apart, and nothing to attack")


def is_near(a: Tensor | None, b: Tensor) -> bool:
    """Whether logits are the same but for rounding, in half precision, too."""
    if a is None:
        return False
    a, b = a.nan_to_num(), b.nan_to_num()
    return bool((a - b).abs().max() <= 0.03 * b.abs().max())


def check_mode(net: nn.Module, x: Tensor, z: Tensor) -> None:
    """One line, if a function gives other logits than z [B,K] for the first image alone: inside of
    it, where no mode can be set, a net is in train mode. One that draws numbers is told.
    """
    again, _ = tried(net, x)
    if not is_near(again, z):
        told = "warning: the function gives other logits for the same images: does it draw numbers"
        print(f"{told} on purpose? If not, call .eval() on the net in it")
        return
    alone, why = tried(net, x[:1])
    told = "the function gives other logits for an image in another batch: call .eval() on the net"
    I.require(is_near(alone, z[:1]), f"{told} in it, or give that net itself{why and ': '}{why}")


def as_net(net: Callable, x: Tensor, y: Tensor) -> nn.Module:
    """The net as it is, or Adapted where it has no parameters, another dtype or more outputs."""
    I.require(callable(net), f"a {type(net).__name__} is no net: give one that maps x to logits")
    known = first_float(net)
    device, dtype = x.device, torch.float32
    if known is not None:
        device, dtype = known.device, known.dtype
    some = I.to_float(x[:2], device)
    if dtype == torch.float32:
        some = some.float()
    try:
        output, why = tried(net, some)
        if is_ordinary(net, output):
            check_logits(output, some, y)
            return net
        adapted = Adapted(net, dtype, device)
        output, still = tried(adapted, some)
    except torch.OutOfMemoryError:  # batches are halved until they fit
        return net
    told = f"the net does not take images {list(some.shape)}: {still or why}"
    I.require(output is not None, told)
    check_logits(output, some, y)
    if not isinstance(net, nn.Module):
        check_mode(adapted, some, output)
    return adapted


def made_usable(*, model, x, y, attacks: dict, source=None, **others) -> dict:
    """The same arguments of infoard.still_right, usable, or one line for what cannot be."""
    x = as_images(x)
    y = as_labels(y, len(x))
    if not len(x):
        return {}
    if x.dtype not in (torch.uint8, torch.float32):
        known = first_float(model)
        if known is None or known.dtype != x.dtype or x.dtype != torch.float64:
            x = x.float()  # half precision is too coarse for eps
    made = {"x": x, "y": y, "model": as_net(model, x, y)}
    if "aa" in attacks:
        from companions.autoattack import with_l2

        made["attacks"] = with_l2(attacks)
    if source is not None:
        made["source"] = as_net(source, x, y)
    return made

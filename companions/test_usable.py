"""What holds for usable.py: whatever form images, labels and nets have, the same is measured."""

import pytest
import torch
from torch import nn

import infoard as I
from companions import usable
from test_infoard import one_line, rand, seeded

each = pytest.mark.parametrize
ATTACKS = "clean,fgsm,cw"


def small_net():
    """A net of float32 parameters."""
    return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 10))).eval()


def images_and_labels(net, n=20):
    """Images in 255ths, of which every second is right."""
    x = (255 * rand(n, 3, 6, 6).float()).round() / 255
    y = I.predict(net, x).argmax(1)
    return x, (y + torch.arange(n) % 2) % 10


def accuracies(net, x, y, **options):
    """What evaluate finds of them."""
    result = I.evaluate(net, x, y, attacks=ATTACKS, eps=16 / 255, **options)
    return [result[name] for name in ("clean", "fgsm", "cw", "worst")]


# ==== 1. Images and labels ========================================================================

SAME_IMAGES = {
    "float64": lambda x: x.double(),
    "numpy": lambda x: x.numpy(),
    "uint8": lambda x: (255 * x).round().byte(),
    "a rounding": lambda x: torch.where(x == 0, x - 1e-7, torch.where(x == 1, x + 1e-7, x)),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
}
SAME_LABELS = {
    "int32": lambda y: y.int(),
    "float": lambda y: y.float(),
    "numpy": lambda y: y.numpy(),
    "a list": lambda y: y.tolist(),
    "a column": lambda y: y[:, None],
}


@each("form", SAME_IMAGES)
def test_images_of_another_form_give_the_same(form):
    net = small_net()
    x, y = images_and_labels(net)
    x[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    assert accuracies(net, SAME_IMAGES[form](x), y) == accuracies(net, x, y)


@each("form", SAME_LABELS)
def test_labels_of_another_form_give_the_same(form):
    net = small_net()
    x, y = images_and_labels(net)
    assert accuracies(net, x, SAME_LABELS[form](y)) == accuracies(net, x, y)


def test_half_precision_images_are_looked_at_in_float32():
    made = usable.made_usable(
        model=small_net(), x=rand(4, 3, 6, 6).half(), y=[0, 1, 2, 3], attacks={}
    )
    assert made["x"].dtype == torch.float32


REFUSED = {
    "channels last": (lambda x, y: (x.permute(0, 2, 3, 1), y), "permute"),
    "no channels": (lambda x, y: (x[:, 0], y), "N,C,H,W"),
    "whole numbers": (lambda x, y: ((255 * x).long(), y), "uint8"),
    "normalised": (lambda x, y: (x - 0.5, y), "inside the model"),
    "nan": (lambda x, y: (x * torch.nan, y), "inside the model"),
    "one-hot": (lambda x, y: (x, torch.eye(10)[y]), "argmax"),
    "broken labels": (lambda x, y: (x, y + 0.5), "whole numbers"),
    "negative labels": (lambda x, y: (x, y - 11), "negative"),
    "labels of other classes": (lambda x, y: (x, y + 5), "10 classes"),
    "fewer labels": (lambda x, y: (x, y[:5]), "5 labels"),
    "no images": (lambda x, y: (x[:0], y[:0]), "needs images"),
    "text": (lambda x, y: ("x", y), "images must be"),
}


@each("form", REFUSED)
def test_what_cannot_be_meant_is_one_line(form):
    net = small_net()
    change, told = REFUSED[form]
    with pytest.raises(I.InfoardError, match=told) as error:
        accuracies(net, *change(*images_and_labels(net)))
    assert one_line(error.value)


# ==== 2. Nets =====================================================================================


class Wrapped(nn.Module):
    """A net whose logits come in some form."""

    def __init__(self, net, form):
        super().__init__()
        self.net = net
        self.form = form

    def forward(self, x):
        return self.form(self.net(x))


class Viewing(nn.Module):
    """A net that looks at memory in the usual order alone."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.view(len(x), -1))


class Output:
    """What nets of some libraries give."""

    def __init__(self, logits):
        self.logits = logits


def without_parameters(net):
    """The same function as a module of no parameters."""
    weight, bias = net[1].weight.detach(), net[1].bias.detach()

    class Plain(nn.Module):
        def forward(self, x):
            return x.flatten(1) @ weight.T + bias

    return Plain()


SAME_NETS = {
    "tuple": lambda net: Wrapped(net, lambda z: (z, z.mean())),
    "dict": lambda net: Wrapped(net, lambda z: {"logits": z}),
    "object": lambda net: Wrapped(net, Output),
    "view": Viewing,
    "no parameters": without_parameters,
    "function": lambda net: net.forward,
    "float64": lambda net: net.double(),
}


@each("form", SAME_NETS)
def test_nets_of_another_form_give_the_same(form):
    x, y = images_and_labels(small_net())
    found = accuracies(SAME_NETS[form](small_net()), x, y)
    assert found == accuracies(small_net(), x, y)
    assert found[0] == 50.0 > found[3]
    moved = accuracies(small_net(), x, y, source=SAME_NETS[form](small_net()))
    assert moved == found


def test_a_function_around_a_net_in_train_mode_is_one_line(capsys):
    net = seeded(lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(108), nn.Linear(108, 10)))
    x, y = images_and_labels(net.eval())
    right = accuracies(net, x, y)
    assert accuracies(lambda x: net(x), x, y) == right
    net.train()
    with pytest.raises(I.InfoardError, match="call .eval.. on the net in it") as error:
        accuracies(lambda x: net(x), x, y)
    assert one_line(error.value)
    right = accuracies(net.eval(), x, y)  # the tries have moved its running statistics
    assert accuracies(net.train(), x, y) == right and net.training  # it is put into eval mode
    torch.manual_seed(0)
    accuracies(lambda x: net.eval()(x) + torch.rand(len(x), 10), x, y)
    assert "does it draw numbers on purpose?" in capsys.readouterr().out


def test_a_net_in_half_precision_is_attacked_in_float32():
    x, y = images_and_labels(small_net())
    seen = []
    net = small_net().bfloat16()
    net.register_forward_hook(lambda net, inputs, output: seen.append(inputs[0].dtype))
    result = I.evaluate(net, x, y, attacks="clean,fgsm", eps=2 / 255)
    assert set(seen) == {torch.bfloat16}
    assert abs(result["clean"] - 50) <= 20  # what bfloat16 rounds away
    assert result["fgsm"] <= result["clean"]


@each(
    "form, told",
    [
        (lambda z: z[:, :, None], "not logits"),
        (lambda z: z.argmax(1), "not logits"),
        (lambda z: "cat", "not logits"),
        (lambda z: z[:, :1], "one class|1 classes"),
        (lambda z: 1 / 0, "division by zero"),
    ],
)
def test_what_is_no_net_is_one_line(form, told):
    net = Wrapped(small_net(), form)
    x, y = images_and_labels(small_net())
    with pytest.raises(I.InfoardError, match=told) as error:
        accuracies(net, x, y)
    assert one_line(error.value)


def test_an_ordinary_net_is_left_as_it_is():
    net = small_net()
    x, y = images_and_labels(net)
    made = usable.made_usable(model=net, x=x, y=y, attacks={}, source=net)
    assert made["model"] is net and made["source"] is net
    assert made["x"] is x and torch.equal(made["y"], y)


def test_classes_are_those_of_the_logits():
    net = small_net()
    x, y = images_and_labels(net)
    two = y.unique()[:2]
    rows = torch.isin(y, two)
    result = I.evaluate(net, x[rows], y[rows], attacks="clean,pgd_t")
    assert result["n"] == int(rows.sum()) and len(result["per_class"]) == 2

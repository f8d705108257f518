"""NAMID and MID: two other published defences, on infoard.py's attack, bounds, models and loop.

    python infoard.py --framework namid     AT or TRADES, plus natural and adversarial information
    python infoard.py --framework mid       an encoder that learns to meet attacks it has not seen
    python infoard.py mi CKPT               the measurement behind NAMID, of any checkpoint

    1  attacks    2  natural and adversarial information    3  NAMID    4  MID    5  measurement

They stand in tables of infoard.py that are open to anyone (FRAMEWORKS, ATTACKS, PRESETS, ...; the
end of this file fills them): a framework of yours enters in the same way.

[NAMID] Zhou et al., ICML 2022     [MID] Meta Invariance Defense, 2404.03340     [CPC] 1807.03748
[MI-FGSM] 1710.06081   [BIM] 1607.02533   [Spatial] 1712.02779   [SSIM] Wang et al., TIP 2004
[CIFAR-C] common corruptions, 1903.12261
"""
import json
import math
from collections import OrderedDict
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import extras
import infoard as I

# ==== 1. Attacks ==================================================================================
def target_objective(model, y: Tensor):
    """-CE(S(x'), another class), for pgd: y + 1 for the first of a batch, y + 2 for the next..."""
    def loss(z, t):
        k = z.shape[1]
        return -F.cross_entropy(z, (t[:, 0] + 1 + t[:, 1] % (k - 1)) % k, reduction="none")
    return I.against(loss, model, torch.stack([y, torch.arange(len(y), device=y.device)], dim=1))

def spatial(model: nn.Module, x: Tensor, y: Tensor, *, tries: int = 10,
            generator: torch.Generator | None = None, **_) -> Tensor:
    """The worst of x and 10 random rotations (to 30 degrees) with shifts (to a tenth) [Spatial]."""
    from torchvision.transforms.functional import InterpolationMode, affine
    worst, least = x, I.margin(I.predict(model, x), y)
    draws = torch.rand(tries, 3, device=x.device, generator=generator) * 2 - 1
    for turn, right, down in draws.tolist():
        shift = [round(right * x.shape[3] / 10), round(down * x.shape[2] / 10)]
        moved = affine(x, 30 * turn, shift, 1.0, [0.0], InterpolationMode.BILINEAR)
        lead = I.margin(I.predict(model, moved), y)
        worst = torch.where((lead < least).view(-1, 1, 1, 1), moved, worst)
        least = torch.minimum(lead, least)
    return worst

# name: how strong in CIFAR-10-C, severities 1 to 5, for 32x32 pixels [CIFAR-C]; blur (one of its
# four extra ones): sigma in pixels; jpeg: quality
SEVERITIES = dict(noise=(0.04, 0.06, 0.08, 0.09, 0.1), shot=(500, 250, 100, 75, 50),
                  impulse=(0.01, 0.02, 0.03, 0.05, 0.07), blur=(0.4, 0.6, 0.7, 0.8, 1.0),
                  bright=(0.05, 0.1, 0.15, 0.2, 0.3), contrast=(0.75, 0.5, 0.4, 0.3, 0.15),
                  pixelate=(0.95, 0.9, 0.85, 0.75, 0.65), jpeg=(80, 65, 58, 50, 40))

def corrupted(x: Tensor, kind: str, c: float, g: torch.Generator | None = None) -> Tensor:
    """x [B,3,H,W] with one of CIFAR-10-C's corruptions (those that need neither weather nor a lens)
    of strength c, in [0,1]."""
    from PIL import Image
    from torchvision.transforms.functional import gaussian_blur, to_pil_image, to_tensor
    def normal():
        return torch.randn(x.shape, generator=g, device=x.device)
    def salted():
        u = torch.rand(x.shape, generator=g, device=x.device)
        return torch.where(u < c, (u < c / 2).float(), x)  # half of these white, half black
    def brighter():
        value = x.amax(1, keepdim=True)  # of HSV
        return x * ((value + c).clamp(max=1) / value.clamp(min=1e-6)) + c * (value == 0)
    def blurred():  # edges go on outside, as scipy's mode "nearest" has it
        return gaussian_blur(F.pad(x, (4,) * 4, "replicate"), [9, 9], [c, c])[:, :, 4:-4, 4:-4]
    def coarser(image):
        small = image.resize([int(c * side) for side in image.size], Image.BOX)
        return small.resize(image.size, Image.BOX)
    def compressed(image):
        image.save(file := BytesIO(), "JPEG", quality=c)
        return Image.open(file)
    def by_pillow(change):
        images = map(to_pil_image, x.float().cpu())
        return torch.stack([to_tensor(change(image)) for image in images])
    mean = x.mean((2, 3), keepdim=True)
    kinds = dict(noise=lambda: x + c * normal(), shot=lambda: torch.poisson(x * c, g) / c,
                 impulse=salted, blur=blurred, bright=brighter,
                 contrast=lambda: mean + c * (x - mean), pixelate=lambda: by_pillow(coarser),
                 jpeg=lambda: by_pillow(compressed))
    return I.lookup(kinds, kind, "corruption")().to(x).clamp(0, 1)

def common(model: nn.Module, x: Tensor, y: Tensor, *, kinds=tuple(SEVERITIES),
           generator: torch.Generator | None = None, **_) -> Tensor:
    """Each image with one of kinds, of a severity from 1 to 5, all dealt out equally often in a
    batch, so that many images show the mean over all. It does not look at the model."""
    mixed = torch.rand(len(x), generator=generator, device=x.device).argsort()
    x_new, drawn = x.clone(), mixed % (5 * len(kinds))
    for i in drawn.unique().tolist():
        kind, rows = kinds[i // 5], drawn == i
        x_new[rows] = corrupted(x[rows], kind, SEVERITIES[kind][i % 5], generator)
    return x_new

def cascade(*attacks):
    """One attack of several: each only on the samples that those before it have left right."""
    def attack(net, x, y, **options):
        x_adv, left = x.clone(), torch.arange(len(x), device=x.device)
        for one in attacks:
            left = left[I.predict(net, x_adv[left]).argmax(1) == y[left]]
            if len(left):
                x_adv[left] = one(net, x[left], y[left], **options)
        return x_adv
    return attack

ATTACKS = dict(  # objective, step in units of the radius, steps; for --pool and --attacks
    bim=I.recipe(I.ce_objective, 1 / 8, 10, init="none"),
    mifgsm=I.recipe(I.ce_objective, 1 / 10, 10, init="none", momentum=1.0),
    mifgsm_t=I.recipe(target_objective, 1 / 10, 10, init="none", momentum=1.0),
    pgd_t=I.recipe(target_objective, 1 / 4, 20),
    pgd_l2=I.recipe(I.ce_objective, 1 / 8, 20, "l2"),
    pgd_l2_t=I.recipe(target_objective, 1 / 8, 20, "l2"),
    pgd5_cw=cascade(*[I.ATTACKS["pgd_sat"]] * 5, I.ATTACKS["cw"]), spatial=spatial,
    corrupt=common, **{kind: partial(common, kinds=[kind]) for kind in SEVERITIES})

# ==== 2. Natural and adversarial information ======================================================
# f_ii - log mean_{j != i} exp f_ij, and what infonce and js_divergence are the means of
def pointwise(scores: Tensor, bound: str = "dv") -> Tensor:
    """Each row's own share of a bound, [...,B,B] -> [...,B] in nats. Of one sample it bounds no
    information: it is how far its critic tells its own partner from all others."""
    b, joint = scores.shape[-1], scores.diagonal(dim1=-2, dim2=-1)
    same = torch.eye(b, dtype=torch.bool, device=scores.device)
    others = scores.masked_fill(same, -math.inf)  # the diagonal is left out, not set to zero
    rows = dict(dv=lambda: joint - others.logsumexp(-1) + math.log(b - 1),
                infonce=lambda: joint - scores.logsumexp(-1) + math.log(b),
                jsd=lambda: math.log(2) + 0.5 * F.logsigmoid(joint)
                + 0.5 * F.logsigmoid(-others).sum(-1) / (b - 1))
    return I.lookup(rows, bound, "bound")()

class Project(nn.Module):
    """Vectors [N,C] -> [N,D]: a hidden layer beside a linear shortcut, then normalised."""
    def __init__(self, c: int, dim: int):
        super().__init__()
        self.deep = nn.Sequential(nn.Linear(c, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(),
                                  nn.Linear(dim, dim))
        self.shortcut = nn.Linear(c, dim, bias=False)
    def forward(self, v: Tensor) -> Tensor:
        return F.normalize(self.deep(v) + self.shortcut(v), dim=1)

class LocalCritic(nn.Module):
    """scores[p,i,j] = <g(z_i), h(a_jp)>/tau: logits against each place p of an encoded image."""
    # differs: released code has width 2048 and layer norms of free scale; eq. 5 is then unbounded
    def __init__(self, classes: int, dim: int = 128, tau: float = 0.1):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 128, 4, 2, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU())
        self.g, self.h, self.tau = Project(classes, dim), Project(128, dim), tau
    def forward(self, a: Tensor, *logits: Tensor) -> list[Tensor]:
        places = self.encoder(a).flatten(2).permute(2, 0, 1)  # [P, B, 128]
        h = self.h(places.flatten(0, 1)).unflatten(0, places.shape[:2])  # [P, B, D]
        return [self.g(z) @ h.transpose(1, 2) / self.tau for z in logits]  # [P, B, B]

class Estimators(nn.Module):
    """How much logits z say of x (natural) and of n = x' - x (adversarial) [NAMID]. As a net it is
    the one that they are trained on, which is no part of its state."""
    def __init__(self, net: nn.Module, classes: int, dim: int = 128, bound: str = "dv"):
        super().__init__()
        self.held, self.bound = (net,), bound
        self.natural, self.adversarial = LocalCritic(classes, dim), LocalCritic(classes, dim)
    def forward(self, x: Tensor) -> Tensor:
        return self.held[0](x)
    def information(self, x: Tensor, x_adv: Tensor, s: Tensor, s_adv: Tensor) -> Tensor:
        """N(z) and A(z) of z = s, s_adv, logits on x, x_adv: [2,2,B] in nats, mean over places."""
        if len(x) < 2:  # one image alone has no negatives
            return 0 * sum(p.sum() for p in self.parameters()).expand(2, 2, len(x))
        with torch.autocast(x.device.type, enabled=False):
            scores = [*self.natural(x, s, s_adv), *self.adversarial(x_adv - x, s, s_adv)]
        return pointwise(torch.stack(scores), self.bound).mean(1).view(2, 2, -1)
    def findings(self, x: Tensor, y: Tensor, eps: float, size: int = 256) -> dict:
        """E_N(x, S(x)), E_N(x, S(x')), E_A(x'-x, S(x)), ... by PGD-20: {group: {name: [mean, half
        of its 95% interval]}} in nats; negatives: the batch, one of equal ones up to `size`."""
        I.require(len(x) > 1, "the measurement needs two test images: raise --eval-subset")
        device, size, columns = next(self.parameters()).device, len(x) // -(-len(x) // size), []
        g = torch.Generator(device).manual_seed(0)
        for i in range(0, len(x) - size + 1, size):
            x_b, y_b = I.to_float(x[i:i + size], device), y[i:i + size].to(device)
            x_adv = I.ATTACKS["pgd_sat"](self.held[0], x_b, y_b, eps=eps, generator=g)
            s, s_adv = I.predict(self, x_b), I.predict(self, x_adv)
            with torch.no_grad(), I.frozen_eval(self):
                (n, n_adv), (a, a_adv) = self.information(x_b, x_adv, s, s_adv)
            right, right_adv = (z.argmax(1) == y_b for z in (s, s_adv))
            columns.append(torch.stack([n, n_adv, n_adv - n, a, a_adv, a_adv - a,
                                        right, right_adv]))
        *values, right, right_adv = torch.cat(columns, dim=1).double().cpu()  # each [N]
        groups = dict(all=right >= 0, resisted=right * right_adv > 0, fooled=right > right_adv,
                      wrong=right == 0)
        names = "N(x)", "N(x')", "N(x')-N(x)", "A(x)", "A(x')", "A(x')-A(x)"
        return {group: dict(n=int(rows.sum())) | {
            name: [v[rows].mean().item(), 1.96 * v[rows].std().item() / math.sqrt(rows.sum())]
            for name, v in zip(names, values, strict=True)}
            for group, rows in groups.items() if rows.sum() > 1}

# ==== 3. NAMID ====================================================================================
# estimators  max  N(x) + A(x')  (eq. 4)  or  N(x) - N(x') + A(x') - A(x) over the fooled  (eq. 5)
# namid       min  L + alpha ( 1 - cos(N(x'), N(x)) + 1 - cos(A(x'), A(x))
#                              + lambda mean(A(x') - N(x')) )  over the fooled, L of at or trades
#             N(x): E_N(x, S(x)), N(x'): E_N(x, S(x')), A likewise with x' - x in the place of x
def fooled(step: I.Step) -> Tensor:
    """Weights [B] of the mean over samples right on x and wrong on x'; all zero if none is."""
    right, right_adv = (z.argmax(1) == step.y for z in (step.s, step.s_adv))
    w = (right & ~right_adv).float()
    return w / w.sum().clamp(min=1)

def estimators(step: I.Step) -> Tensor:
    """NAMID's critics, of a fixed net whose logits step.s and step.s_adv are."""
    # differs: eq. 5 is the paper's choice, eq. 4 the default here (README says why); released code
    # has cosines between N(x) and N(x') instead; Adam there, the loop's SGD here
    step.attack(I.ce_objective(step.student, step.y))
    (n, n_adv), (a, a_adv) = step.student.information(step.x, step.x_adv, step.s, step.s_adv)
    step.terms |= dict(n=n.mean(), n_adv=n_adv.mean(), a=a.mean(), a_adv=a_adv.mean())
    if step.cfg.mi_train == "max":
        return -(n + a_adv).mean()
    return -(fooled(step) * (n - n_adv + a_adv - a)).sum()

def namid(step: I.Step, base=I.at) -> Tensor:
    """NAMID: what attacked logits say of x, and of x' - x, is to be what clean ones say. Two passes
    of the student; the cosine is that of vectors over the batch, as in released code."""
    # differs: paper and code have alpha = 5 from the start (--alpha 5 --mi-ramp 0, see README);
    # released code has no lambda, selects by a softmax over the batch, makes seven passes
    I.require(step.estimators, "namid needs estimators")
    loss = base(step)
    (n, n_adv), (a, a_adv) = step.estimators.information(step.x, step.x_adv, step.s, step.s_adv)
    w = fooled(step)
    unlike = sum(w.any() * (1 - F.cosine_similarity(w * u, w * v, dim=0))
                 for u, v in ((n_adv, n), (a_adv, a)))
    push = (w * (a_adv - n_adv)).sum()
    step.terms |= dict(unlike=unlike, push=push)
    ramp = min(1, step.progress / step.cfg.mi_ramp) if step.cfg.mi_ramp else 1
    return loss + ramp * step.alpha * (unlike + step.cfg.mi_lambda * push)

def prepare_estimators(student: nn.Module, teacher: nn.Module, cfg: I.Config, classes: int):
    """What the framework estimators trains."""
    return Estimators(teacher, classes, cfg.critic_dim, cfg.mi_bound)

def trained_estimators(cfg: I.Config, path: str) -> str:
    """Their best.pt: a run of its own, in runs/teachers."""
    more = "mi_bound mi_train critic_dim eval_subset teacher_norm teacher_arch"
    return I.trained(cfg, "estimators", cfg.student, path,
                     **{k: getattr(cfg, k) for k in more.split()})

def get_estimators(cfg: I.Config, teacher: nn.Module, path: str, classes: int) -> dict:
    """The estimators of a net, trained once and then kept."""
    critics = prepare_estimators(None, teacher, cfg, classes)
    critics.load_state_dict(I.load_tensors(trained_estimators(cfg, path))["model"])
    critics.to(next(teacher.parameters()).device).eval().requires_grad_(False)
    return dict(estimators=critics)

# ==== 4. MID ======================================================================================
# teacher  CE(C(E_t(x)), y) + |D(E_t(x)) - x|^2, on clean images; then fixed
# mid      J(theta; pool) + J(theta - lr grad J(theta; pool); held out),  theta: the encoder E_s
#          J = CE(C(f), y) + a KL(E_t(x) || f) + c KL(E_t(x) || E_t(D(f))),  f = E_s(x')
#          label, adversarial and cyclic consistency; the defended net is C(E_s(x))
class Autoencoder(nn.Sequential):
    """A net of MODELS, cut before its pooling into encoder E and head C, and a decoder D; forward
    is the net's, whose names it keeps. D: transposed convolutions alone, as in released code."""
    def __init__(self, net: nn.Sequential, size: int):
        super().__init__(OrderedDict(net.named_children()))
        self.cut = [name for name, _ in self.named_children()].index("avgpool")
        with torch.no_grad(), I.frozen_eval(self):
            _, c, h, _ = self.encode(torch.zeros(1, 3, size, size)).shape
        I.require(size // h * h == size and size // h & (size // h - 1) == 0,
                  f"a decoder needs images of a size that its net halves evenly, not {size} pixels")
        wide = [c, *(max(64, c >> i + 1) for i in range(round(math.log2(size / h))))]
        up = [nn.ConvTranspose2d(a, b, 4, 2, 1) for a, b in zip(wide, wide[1:], strict=False)]
        self.decoder = nn.Sequential(*up, nn.ConvTranspose2d(wide[-1], 64, 3, 1, 1),
                                     nn.ConvTranspose2d(64, 3, 3, 1, 1))
    def encode(self, x: Tensor) -> Tensor:
        for layer in list(self)[:self.cut]:
            x = layer(x)
        return x
    def forward(self, x: Tensor, features: bool = False):
        """Logits [B,K], or (features [B,C,h,w], logits)."""
        f = z = self.encode(x)
        for layer in list(self)[self.cut:-1]:
            z = layer(z)
        return (f, z) if features else z
    def regenerated(self, x: Tensor) -> Tensor:
        """The image D(E(x)), in [0,1]."""
        with I.frozen_eval(self):
            return I.predict(lambda x: self.decoder(self.encode(x)), x).clamp(0, 1)
    def quality(self, x: Tensor, x_adv: Tensor) -> dict:
        """PSNR and SSIM of the images made of x and of x', both against x."""
        (psnr, ssim), (psnr_adv, ssim_adv) = (
            likeness(x, self.regenerated(z)) for z in (x, x_adv))
        return dict(psnr=psnr, psnr_adv=psnr_adv, ssim=ssim, ssim_adv=ssim_adv)

# PSNR = -10 log10 mean (x - z)^2; SSIM: mean of (2 m_x m_z + c)(2 s_xz + d) / ((m_x^2 + m_z^2 + c)
# (s_x^2 + s_z^2 + d)), c = 0.01^2, d = 0.03^2, moments under a Gaussian of width 1.5        [SSIM]
def likeness(x: Tensor, z: Tensor) -> tuple[float, float]:
    """(PSNR in dB, SSIM) of images [B,C,H,W] in [0,1], means over images."""
    psnr = -10 * (x - z).square().mean((1, 2, 3)).clamp(min=1e-10).log10()
    g = torch.exp(-(torch.arange(11.0, device=x.device) - 5) ** 2 / (2 * 1.5 ** 2))
    window = (g[:, None] * g / g.sum() ** 2).expand(x.shape[1], 1, 11, 11)
    x, z, xx, zz, xz = (F.conv2d(f, window, groups=x.shape[1])
                        for f in (x, z, x * x, z * z, x * z))
    same = (2 * x * z + 1e-4) / (x * x + z * z + 1e-4)
    same = same * (2 * (xz - x * z) + 9e-4) / (xx - x * x + zz - z * z + 9e-4)
    return round(psnr.mean().item(), 2), round(same.mean().item(), 4)

def autoencoder(step: I.Step) -> Tensor:
    """MID's teacher, on clean images."""
    # differs: the paper has the norm of the difference, which diverges here; released code has this
    f, z = step.student(step.x, features=True)
    mse = F.mse_loss(I.full(step.student.decoder(f)), step.x)
    step.terms |= dict(mse=mse)
    return F.cross_entropy(I.full(z), step.y) + mse

def consistency(step: I.Step, x_adv: Tensor, theta: dict, a: float, c: float) -> Tensor:
    """J of attacked images [n B,C,H,W] under the parameters theta. KL of softmax over channels, in
    nats: a sum over channels, a mean over positions and samples."""
    # differs: released code divides KL by channels too, and its cyclic KL has no gradient
    n = len(x_adv) // len(step.y)
    f_t = I.predict(step.teacher.encode, step.x).repeat(n, 1, 1, 1)  # [n B, C_l, h, w]
    f, z = torch.func.functional_call(step.student, theta, (x_adv,), dict(features=True))
    cycled = step.teacher.encode(step.teacher.decoder(f))
    return F.cross_entropy(I.full(z), step.y.repeat(n)) \
        + a * I.kl(f_t, f).mean() + c * I.kl(f_t, cycled).mean()

def mid(step: I.Step, transfer: bool = False) -> Tensor:
    """MID: a first-order meta-step. One attack of the pool, drawn at random, is held out; its loss
    is taken where a step on the others leads, and its gradient goes to theta. The pool attacks the
    net in training, or with transfer, as published, an undefended one."""
    # differs: a mean over the pool, not a sum; L2 attacks in it, any other class as a target; SGD
    # with the loop's lr within and without (there 1e-4, Adam outside). Weights of J: those of
    # released code, which always tests on its last attack and loses the gradient of that test
    cfg, net = step.cfg, step.teacher_nat if transfer else step.student
    pool = [name.strip() for name in cfg.pool.split(",")]
    held_out = pool.pop(int(torch.randint(len(pool), (), generator=step.generators.get("data"))))
    def attack(name: str) -> Tensor:
        return step.x if name == "clean" else I.ATTACKS[name](
            net, step.x, step.y, eps=cfg.eps, eps_l2=cfg.eps_l2, most=cfg.steps,
            generator=step.generators.get("attack"))
    theta = {k: p for k, p in step.student.named_parameters() if p.requires_grad}
    known = consistency(step, torch.cat([attack(name) for name in pool]), theta, 1.5, 0.8)
    grads = torch.autograd.grad(1024 * known, list(theta.values()))  # as in pgd, for fp16
    grads = [g / 1024 for g in grads]
    lr = cfg.lr_at(step.progress)
    moved = {k: p - lr * g for (k, p), g in zip(theta.items(), grads, strict=True)}
    unknown = consistency(step, attack(held_out), moved, 1.0, 1.0)
    step.terms |= dict(known=known, unknown=unknown)
    again = sum((g * (p - p.detach())).sum() for p, g in zip(theta.values(), grads, strict=True))
    return known.detach() + again + unknown  # again: 0, with the gradient of known

def check_mid(cfg: I.Config) -> None:
    """One line for a pool that cannot be split, and for a teacher that has no decoder."""
    I.require(cfg.teacher or cfg.teacher_framework == "autoencoder",
              "MID needs a teacher with a decoder: --teacher-framework autoencoder")
    pool = {I.lookup(["clean", *I.ATTACKS], name.strip(), "attack") for name in cfg.pool.split(",")}
    I.require(len(pool) > 1 and len(pool) == len(cfg.pool.split(",")),
              f"--pool needs two different attacks or more, not {cfg.pool}")

def prepare_mid(student: Autoencoder, teacher: Autoencoder, cfg: I.Config, classes: int):
    """A new encoder under the head and the decoder of the teacher, which stay as they are."""
    alike = isinstance(teacher, Autoencoder) and teacher.state_dict().keys() == \
        student.state_dict().keys()
    I.require(alike, "MID needs a teacher with a decoder, made by --framework autoencoder")
    for mine, theirs in list(zip(student, teacher, strict=True))[student.cut:]:
        mine.load_state_dict(theirs.state_dict())
        mine.requires_grad_(False)
    return student

# ==== 5. The measurement ==========================================================================
def figure_information(figure, found: dict) -> None:
    """Natural and adversarial information of clean and attacked images, with 95% intervals."""
    figure.set_size_inches(6, 2.2)
    for ax, k in zip(figure.subplots(1, 2), "NA", strict=True):
        for i, name in enumerate((f"{k}(x)", f"{k}(x')")):
            mean, half = zip(*(group[name] for group in found.values()), strict=True)
            ax.errorbar(np.arange(len(found)) + 0.2 * i - 0.1, mean, half, fmt="o", label=name)
        ax.set(ylabel="nats", title=dict(N="natural", A="adversarial")[k] + " information")
        ax.set_xticks(range(len(found)), [f"{group}\n{v['n']}" for group, v in found.items()])
        ax.legend()

def run_mi(path: str, **given) -> None:
    """Is a net's natural information smaller, its adversarial one larger on attacked images? The
    estimators are trained once for a checkpoint; --mi-train difference presupposes the answer."""
    cfg = I.Config(**dict(eval_subset=1024) | I.settings(path, given) | dict(teacher=path))
    out = Path(trained_estimators(cfg.resolved(), path)).parent
    found = json.loads((out / "results.json").read_text())["findings"]
    names = list(found["all"])[1:]
    lines = [[group, str(v["n"]), *(f"{v[k][0]:.3f} ± {v[k][1]:.3f}" for k in names)]
             for group, v in found.items()]
    print(extras.markdown([["nats", "n", *names], *lines]))
    for what, sign, name in (("smaller", -1, "N(x')-N(x)"), ("larger", 1, "A(x')-A(x)")):
        mean, half = found["all"][name]
        verdict = "unclear" if abs(mean) < half else "yes" if mean * sign > 0 else "no"
        print(f"{name[0]} {what} on attacked images: {verdict} ({mean:+.3f} ± {half:.3f})")
    extras.draw(out / "figures", information=partial(figure_information, found=found))

# ==== Entries in the tables of infoard.py =========================================================
# A framework is a function of a Step that gives its loss. It may have as attributes: check(cfg),
# before anything else; nets(cfg, teacher, path, classes), more nets for its Step; prepare(student,
# teacher, cfg, classes), the net to train. That net may have quality(x, x'), findings(x, y, eps),
# which give dicts for results.json, and regenerated(x), images for the sheet.
namid_trades, mid_transfer = partial(namid, base=I.trades), partial(mid, transfer=True)
estimators.prepare = prepare_estimators
namid.nets = namid_trades.nets = get_estimators
mid.prepare = mid_transfer.prepare = prepare_mid
mid.check = mid_transfer.check = check_mid
I.FRAMEWORKS |= dict(estimators=estimators, namid=namid, namid_trades=namid_trades,
                     autoencoder=autoencoder, mid=mid, mid_transfer=mid_transfer)
I.NEED_TEACHER += ["estimators", "namid", "namid_trades", "mid", "mid_transfer"]
I.NEED_NATURAL += ["mid_transfer"]
I.SCORES |= dict(estimators="epoch", autoencoder="val_clean")
NAMID = dict(infoard=False, twin="", teacher_framework="at", alpha=1.0, beta=6.0)
MID = dict(infoard=False, twin="_ae", teacher_framework="autoencoder")
I.PRESETS |= dict(estimators=dict(infoard=False), autoencoder=dict(infoard=False, twin="_ae"),
                  namid=NAMID, namid_trades=NAMID, mid=MID, mid_transfer=MID)
I.ATTACKS |= ATTACKS
I.OUTSIDE += ["pgd_l2", "pgd_l2_t", "spatial", "corrupt", *SEVERITIES]
I.METRICS[5:5] = ["bim", "mifgsm", "mifgsm_t", "pgd_t", "pgd5_cw"]
I.METRICS += [*I.OUTSIDE, "psnr", "psnr_adv", "ssim", "ssim_adv"]
I.WRAPPERS["_ae"] = Autoencoder
I.VERBS["mi"] = run_mi

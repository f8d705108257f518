"""MID: an encoder that learns to meet attacks that it has not seen, and regenerates images.

    python infoard.py --framework mid              the pool attacks the net in training
    python infoard.py --framework mid_transfer     it attacks an undefended net, as published
    python infoard.py --framework autoencoder      the teacher, trained by itself if it is missing

    1  the autoencoder    2  how like two images are    3  losses    4  training

teacher  CE(C(E_t(x)), y) + |D(E_t(x)) - x|^2, on clean images; then fixed
mid      J(theta; pool) + J(theta - lr grad J(theta; pool); held out),  theta: the encoder E_s
         J = CE(C(f), y) + a KL(E_t(x) || f) + c KL(E_t(x) || E_t(D(f))),  f = E_s(x')
         label, adversarial and cyclic consistency; the defended net is C(E_s(x))

[MID] Meta Invariance Defense, 2404.03340     [SSIM] Wang et al., TIP 2004
"""

import math
from collections import OrderedDict
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import infoard as I
from companions.attacks import attack_by_name

# ==== 1. The autoencoder ==========================================================================


def make_decoder(channels: int, height: int, size: int) -> nn.Sequential:
    """Feature maps [B,channels,height,height] -> images [B,3,size,size].

    Transposed convolutions alone, as in released code; each of the first doubles the resolution.
    """
    doublings = round(math.log2(size / height))
    told = f"a decoder needs images of a size that its net halves evenly, not {size} pixels"
    I.require(height * 2**doublings == size, told)
    layers = []
    for _ in range(doublings):
        narrower = max(64, channels // 2)
        layers.append(nn.ConvTranspose2d(channels, narrower, 4, 2, 1))
        channels = narrower
    layers.append(nn.ConvTranspose2d(channels, 64, 3, 1, 1))
    layers.append(nn.ConvTranspose2d(64, 3, 3, 1, 1))
    return nn.Sequential(*layers)


class Autoencoder(nn.Sequential):
    """A net of MODELS, cut before its pooling into encoder E and head C, and a decoder D.

    forward is the net's, whose names it keeps.
    """

    def __init__(self, net: nn.Sequential, size: int):
        super().__init__(OrderedDict(net.named_children()))
        names = [name for name, _ in self.named_children()]
        I.require("avgpool" in names, "an autoencoder needs a net with a layer called avgpool")
        self.cut = names.index("avgpool")
        with torch.no_grad(), I.frozen_eval(self):
            _, channels, height, _ = self.encode(torch.zeros(1, 3, size, size)).shape
        self.decoder = make_decoder(channels, height, size)

    def encode(self, x: Tensor) -> Tensor:
        """E(x), [B,C,h,w]."""
        for layer in list(self)[: self.cut]:
            x = layer(x)
        return x

    def forward(self, x: Tensor, features: bool = False):
        """Logits [B,K], or (features [B,C,h,w], logits)."""
        f = self.encode(x)
        z = f
        for layer in list(self)[self.cut : -1]:  # the last is the decoder
            z = layer(z)
        return (f, z) if features else z

    def reconstruct(self, x: Tensor) -> Tensor:
        """The image D(E(x)), not yet in [0,1]."""
        return self.decoder(self.encode(x))

    def regenerated(self, x: Tensor) -> Tensor:
        """The image D(E(x)), in [0,1]."""
        with I.frozen_eval(self):
            return I.predict(self.reconstruct, x).clamp(0, 1)

    def quality(self, x: Tensor, x_adv: Tensor) -> dict:
        """PSNR and SSIM of the images made of x and of x', both against x."""
        psnr, ssim = likeness(x, self.regenerated(x))
        psnr_adv, ssim_adv = likeness(x, self.regenerated(x_adv))
        return {"psnr": psnr, "psnr_adv": psnr_adv, "ssim": ssim, "ssim_adv": ssim_adv}


# ==== 2. How like two images are ==================================================================


def gaussian_means(f: Tensor) -> Tensor:
    """Means under a Gaussian window of width 1.5, 11 pixels wide: [B,C,H,W] -> [B,C,H-10,W-10]."""
    channels = f.shape[1]
    g = torch.exp(-((torch.arange(11.0, device=f.device) - 5) ** 2) / (2 * 1.5**2))
    window = (g[:, None] * g / g.sum() ** 2).expand(channels, 1, 11, 11)
    return F.conv2d(f, window, groups=channels)


def likeness(x: Tensor, z: Tensor) -> tuple[float, float]:
    """(PSNR in dB, SSIM) of images [B,C,H,W] in [0,1], means over images.

        PSNR = -10 log10 mean (x - z)^2
        SSIM = mean (2 m_x m_z + c)(2 s_xz + d) / ((m_x^2 + m_z^2 + c)(s_x^2 + s_z^2 + d))   [SSIM]

    m, s: means and covariances in Gaussian windows; c = 0.01^2, d = 0.03^2.
    """
    error = (x - z).square().mean((1, 2, 3))
    psnr = -10 * error.clamp(min=1e-10).log10()
    m_x = gaussian_means(x)
    m_z = gaussian_means(z)
    variances = gaussian_means(x * x) - m_x * m_x + gaussian_means(z * z) - m_z * m_z
    covariance = gaussian_means(x * z) - m_x * m_z
    ssim = (2 * m_x * m_z + 1e-4) / (m_x * m_x + m_z * m_z + 1e-4)
    ssim = ssim * (2 * covariance + 9e-4) / (variances + 9e-4)
    return round(psnr.mean().item(), 2), round(ssim.mean().item(), 4)


# ==== 3. Losses ===================================================================================


def consistency_loss(
    f: Tensor,
    z: Tensor,
    cycled: Tensor,
    f_t: Tensor,
    y: Tensor,
    a: float,
    c: float,
) -> Tensor:
    """J = CE(z,y) + a KL(f_t||f) + c KL(f_t||cycled) of maps [B,C,h,w], logits [B,K] [MID].

    KL of softmax over channels, in nats: a sum over channels, a mean over positions and samples.
    """
    # differs: released code divides KL by channels too, and its cyclic KL has no gradient
    label = F.cross_entropy(I.as_float32(z), y)
    return label + a * I.kl(f_t, f).mean() + c * I.kl(f_t, cycled).mean()


def consistency(step: I.Step, x_adv: Tensor, theta: dict, a: float, c: float) -> Tensor:
    """J of attacked images [n B,C,H,W] with the parameters theta in the student."""
    n = len(x_adv) // len(step.y)
    f_t = I.predict(step.teacher.encode, step.x).repeat(n, 1, 1, 1)  # [n B, C_l, h, w]
    f, z = torch.func.functional_call(step.student, theta, (x_adv,), {"features": True})
    cycled = step.teacher.encode(step.teacher.decoder(f))
    return consistency_loss(f, z, cycled, f_t, step.y.repeat(n), a, c)


# ==== 4. Training =================================================================================


def autoencoder(step: I.Step) -> Tensor:
    """MID's teacher, on clean images."""
    # differs: the paper has the norm of the difference, which diverges here; released code has this
    f, z = step.student(step.x, features=True)
    mse = F.mse_loss(I.as_float32(step.student.decoder(f)), step.x)
    step.terms["mse"] = mse
    return F.cross_entropy(I.as_float32(z), step.y) + mse


def attacked(step: I.Step, name: str, net: nn.Module) -> Tensor:
    """x' of one attack of the pool on this net, in no more steps than --steps."""
    if name == "clean":
        return step.x
    return attack_by_name(
        name,
        net,
        step.x,
        step.y,
        eps=step.cfg.eps,
        eps_l2=step.cfg.eps_l2,
        max_steps=step.cfg.steps,
        generator=step.generators.get("attack"),
    )


def meta_step(step: I.Step, net: nn.Module) -> Tensor:
    """One attack of the pool, drawn at random, is held out; its loss is taken where a step on the
    others leads, and its gradient goes to theta (first order). net: the one that is attacked.
    """
    # differs: a mean over the pool, not a sum; L2 attacks in it, any other class as a target; SGD
    # with the loop's lr within and without (there 1e-4, Adam outside). Weights of J: those of
    # released code, which always tests on its last attack and loses the gradient of that test
    pool = pool_of(step.cfg)
    drawn = torch.randint(len(pool), (), generator=step.generators.get("data"))
    held_out = pool.pop(int(drawn))
    theta = {name: p for name, p in step.student.named_parameters() if p.requires_grad}

    images = [attacked(step, name, net) for name in pool]
    known = consistency(step, torch.cat(images), theta, 1.5, 0.8)
    grads = torch.autograd.grad(1024 * known, list(theta.values()))  # as in pgd, for fp16
    grads = {name: g / 1024 for name, g in zip(theta, grads, strict=True)}
    lr = step.cfg.lr_at(step.progress)
    moved = {name: p - lr * grads[name] for name, p in theta.items()}

    unknown = consistency(step, attacked(step, held_out, net), moved, 1.0, 1.0)
    step.terms.update(known=known, unknown=unknown)
    again = sum((grads[name] * (p - p.detach())).sum() for name, p in theta.items())
    return known.detach() + again + unknown  # again: 0, with the gradient of known


def mid(step: I.Step) -> Tensor:
    """MID: a first-order meta-step; the pool attacks the net in training."""
    return meta_step(step, step.student)


def mid_transfer(step: I.Step) -> Tensor:
    """MID as published: the pool attacks an undefended net."""
    return meta_step(step, step.teacher_nat)


def pool_of(cfg: I.Config) -> list[str]:
    """The names of MID's attacks."""
    return [name.strip() for name in cfg.own["pool"].split(",")]


def settle_autoencoder(cfg: I.Config) -> I.Config:
    """A net of MODELS with a decoder, and a missing teacher of the same kind."""
    told = f"a decoder can be added to nets of MODELS alone, not to {cfg.student}"
    I.require(":" not in cfg.student, told)
    student = cfg.student.removesuffix("_ae") + "_ae"
    cfg = replace(cfg, student=student)
    return cfg if cfg.teacher else replace(cfg, teacher_arch=student)


def settle_mid(cfg: I.Config) -> I.Config:
    """The same; one line for a pool that cannot be split, and for a teacher without a decoder."""
    cfg = settle_autoencoder(cfg)
    told = "MID needs a teacher with a decoder: --teacher-framework autoencoder"
    I.require(cfg.teacher or cfg.teacher_framework == "autoencoder", told)
    pool = pool_of(cfg)
    for name in pool:
        I.resolve({"clean": None, **I.ATTACKS}, name, "attack")
    told = f"--pool needs two different attacks or more, not {cfg.own['pool']}"
    I.require(len(pool) > 1 and len(set(pool)) == len(pool), told)
    return cfg


def prepare_mid(student: Autoencoder, nets: dict, cfg: I.Config, classes: int) -> Autoencoder:
    """A new encoder under the head and the decoder of the teacher, which stay as they are."""
    teacher = nets["teacher"]
    told = "MID needs a teacher with a decoder, made by --framework autoencoder"
    I.require(isinstance(teacher, Autoencoder), told)
    I.require(teacher.state_dict().keys() == student.state_dict().keys(), told)
    layers = list(zip(student, teacher, strict=True))
    for mine, theirs in layers[student.cut :]:
        mine.load_state_dict(theirs.state_dict())
        mine.requires_grad_(False)
    return student


POOL = "clean,pgd_sat,pgd_t,mifgsm,mifgsm_t,pgd_l2,pgd_l2_t"
AUTOENCODER = I.Framework(
    autoencoder,
    infoard=False,
    best_by="val_clean",
    settle=settle_autoencoder,
)
MID = I.Framework(
    mid,
    needs=("teacher",),
    defaults={"teacher_framework": "autoencoder"},
    options={"pool": (POOL, "attacks, one of which is held out in each step")},
    infoard=False,
    settle=settle_mid,
    prepare=prepare_mid,
)
MID_TRANSFER = replace(MID, loss=mid_transfer, needs=("teacher", "teacher_nat"))

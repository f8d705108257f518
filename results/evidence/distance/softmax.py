"""The distance of a margin of probabilities, in the place of logits: rules of this protocol's own.

python infoard.py --asa results/evidence/distance/softmax.py:softmax --lam-hi 2
"""

from torch import nn

from companions import adaptation


def softmax(t, y, *, teacher, x, **how):
    """As adaptation.distance, of p_y - max_{k != y} p_k."""
    d = adaptation.boundary_distance(nn.Sequential(teacher, nn.Softmax(1)), x, y)
    return adaptation.distance(t, y, distance=d, **how)


def softmax_shuffled(t, y, *, teacher, x, **how):
    """Control: the same radii, dealt out at random."""
    d = adaptation.boundary_distance(nn.Sequential(teacher, nn.Softmax(1)), x, y)
    return adaptation.distance_shuffled(t, y, distance=d, **how)


softmax.needs = ("teacher",)
softmax_shuffled.needs = ("teacher",)

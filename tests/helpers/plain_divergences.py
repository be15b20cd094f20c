"""Divergences by numpy in float64."""

import numpy as np


def softmax(logits):
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def plain(teacher, student, kind, top_k=None, mix=0.5):
    """Returns what `divergence` does; 0 log 0 is 0."""
    p, q = softmax(np.asarray(teacher, np.float64)), softmax(np.asarray(student, np.float64))
    m = mix * p + (1 - mix) * q
    with np.errstate(divide="ignore", invalid="ignore"):
        forward = np.where(p > 0, p * np.log(p / q), 0)
        reverse = np.where((p > 0) & (q > 0), q * np.log(q / p), 0)
        to_m = (np.where(x > 0, x * np.log(x / m), 0) for x in (p, q))
        terms = {
            "forward_kl": forward,
            "reverse_kl": reverse,
            "mixed_kl": (1 - mix) * forward + mix * reverse,
            "jsd": mix * next(to_m) + (1 - mix) * next(to_m),
        }[kind]
    if top_k is not None:
        terms = np.take_along_axis(terms, np.argsort(-p, axis=-1, kind="stable")[..., :top_k], axis=-1)
    return terms.sum(axis=-1)

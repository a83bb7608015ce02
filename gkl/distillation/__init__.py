"""Distillation methods: what is lost between a student's and a teacher's taps. One file each.

    method = GKLKD(context, alpha=16.0, beta=1.0, gamma=0.05, temperature=4.0, prior_temperature=4.0, weights="class")
    terms = method(student_taps, teacher_taps, labels, epoch=1, index=index)      # {"distillation": (b,)}

A method knows no network's inside: it sees `gkl.models.classifier.Taps`. A new one is a file here and a YAML.
"""

from gkl.distillation.base import Context, Distiller, Terms, Vanilla

__all__ = ["Context", "Distiller", "Terms", "Vanilla"]

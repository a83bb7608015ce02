"""Generalized Kullback-Leibler divergence loss and what its paper builds on it. Source: arXiv 2503.08038.

    from gkl.losses import gkl
    from gkl.prior import ClassPrior

Pure parts for anyone's training loop: losses, class prior, attacks, weight perturbation and averaging, networks,
data, evaluation, records and tables. The loops that use them are in `trainers`.
"""

"""KL, DKL, IKL, JSD and GKL between logits in closed form, the class prior that weighs GKL, and both as modules.

    loss = gkl_loss(student, teacher, weights, alpha=20.0, beta=4.0, gamma=0.4)

`closed_form` computes them in O(B·C); on a GPU `triton_kernels` does, in one pass each way.
"""

from gkl.losses.closed_form import dkl, gkl, gkl_loss, ikl, jsd, kl, mean_pair_weight, smooth
from gkl.losses.prior import ClassPrior

__all__ = ["ClassPrior", "dkl", "gkl", "gkl_loss", "ikl", "jsd", "kl", "mean_pair_weight", "smooth"]

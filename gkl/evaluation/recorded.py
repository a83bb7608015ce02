"""The package's attacks with each iteration recorded once and replayed: on a GPU, where launching it takes longer than it does.

    with recordings(device) as replayed:                           # None where nothing is to be recorded
        if replayed:
            Recorded(network, replayed).take_over(adversary, targets)     # an AutoAttack, its loops now ours

An iteration is the package's arithmetic on the package's batch, forward and backward pass of the network included, so that
the outcome has the same bits: the batch is never padded, since a network's kernels, and with them its rounding, depend on the
size of the batch. What the package decides by reading values back is decided by masks on the device.

One file, since the steps of APGD, FAB and Square share what is recorded and how it is replayed.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack
from pyautoattack.checks import check_zero_gradients
from pyautoattack.other_utils import L2_norm
from torch import Tensor

from gkl.evaluation.projection import projection_linf_in
from gkl.graphs import Replayed

KEPT = 12  # recordings at once: for each attack the sizes of its batch and what is between the attacks
QUERIES = 32  # of Square at most, before it is asked whether one of them made an image fall


@contextmanager
def recordings(device: torch.device, graph: bool = True) -> Iterator[Replayed | None]:
    """What records work on a GPU and replays it, nothing elsewhere; dropped at the end, its memory with it."""
    replayed = Replayed(device, kept=KEPT) if graph and device.type == "cuda" else None
    try:
        yield replayed
    finally:
        if replayed is not None:
            replayed.forget()


class Recorded:
    """The loops of AutoAttack's four attacks, for the settings that the package calls standard, linf and l2."""

    def __init__(self, network: Callable[[Tensor], Tensor], replayed: Replayed) -> None:
        """network: images to logits, to be recorded within a loop; the attacks' own `predict` is for what lies around it."""
        self.network, self.replayed = network, replayed
        self.passes = 8  # of FAB's projection: four to eight are needed, more are allowed when they were
        self.packed = 0

    def take_over(self, adversary: AutoAttack) -> None:
        """The attacks' inner loops are ours from now on, but for Square's and part of FAB's in l2, which decide on the host."""
        for attack in (adversary.apgd, adversary.apgd_targeted):
            attack.attack_single_run = partial(self.apgd, attack)
        if adversary.norm == "Linf":
            adversary.fab.attack_single_run = partial(self.fab, adversary.fab)
            adversary.square.attack_single_run = partial(self.square, adversary.square)
        else:
            adversary.fab.get_diff_logits_grads_batch_targeted = self.fab_planes

    # --- APGD ---------------------------------------------------------------------------------------------------------

    def apgd(self, attack: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The images of highest loss, which withstand it, their losses, and what fools the network where it is fooled."""
        target = y if attack.loss == "ce" else attack.y_target
        noise = 2 * torch.rand(x.shape) - 1 if attack.norm == "Linf" else torch.randn(x.shape)
        x_adv = (x + attack.eps * attack.normalize(noise.to(x.device))).clamp(0.0, 1.0)
        logits, loss_best, grad = self._climb(attack.loss, x_adv, y, target)
        if attack.loss == "dlr-targeted":
            check_zero_gradients(grad, logger=attack.logger)
        right = logits.max(1)[1] == y
        state = x_adv, x_adv.clone(), grad, x_adv, grad, loss_best, x_adv, right
        step_size = torch.full((len(x), 1, 1, 1), 2.0 * attack.eps, device=x.device)
        fresh, damped = (torch.tensor(a, device=x.device) for a in (1.0, 0.75))
        losses = torch.zeros(attack.n_iter, len(x), device=x.device)
        checked, reduced = loss_best.clone(), torch.ones_like(loss_best)
        since, every = 0, attack.n_iter_2
        for number in range(attack.n_iter):
            *state, loss = self.replayed(
                ("apgd", attack.norm, attack.eps, attack.loss),
                partial(self._apgd_step, attack),
                (x, y, target, step_size, damped if number else fresh, *state),
            )
            losses[number] = loss
            since += 1
            if since == every:
                x_adv, x_old, grad, x_best, grad_best, loss_best, *rest = state
                rows = torch.arange(number - every, number + 1, device=x.device) % attack.n_iter
                latest = losses[rows]  # before the first row the package, too, finds the last, still zero
                rose = (latest[1:] > latest[:-1]).float().sum(0)
                stuck = (1.0 - reduced) * (checked >= loss_best).float()
                reduced = torch.max((rose <= every * attack.thr_decr).float(), stuck)
                checked = loss_best.clone()
                halved = (reduced > 0).view(-1, 1, 1, 1)
                step_size = torch.where(halved, step_size / 2.0, step_size)
                x_adv, grad = torch.where(halved, x_best, x_adv), torch.where(halved, grad_best, grad)
                state = x_adv, x_old, grad, x_best, grad_best, loss_best, *rest
                since, every = 0, max(every - attack.size_decr, attack.n_iter_min)
        _, _, _, x_best, _, loss_best, fooling, right = state
        return x_best, right, loss_best, fooling

    def _apgd_step(
        self,
        attack: Any,
        x: Tensor,
        y: Tensor,
        target: Tensor,
        step_size: Tensor,
        share: Tensor,
        x_adv: Tensor,
        x_old: Tensor,
        grad: Tensor,
        x_best: Tensor,
        grad_best: Tensor,
        loss_best: Tensor,
        fooling: Tensor,
        right: Tensor,
    ) -> tuple[Tensor, ...]:
        """share: of the step beside the momentum. The state anew, and the losses."""
        momentum = x_adv - x_old

        def within(z: Tensor) -> Tensor:
            if attack.norm == "Linf":
                return torch.clamp(torch.min(torch.max(z, x - attack.eps), x + attack.eps), 0.0, 1.0)
            delta = z - x
            length = L2_norm(delta, keepdim=True).clamp(max=attack.eps)
            return torch.clamp(x + attack.normalize(delta) * length, 0.0, 1.0)

        ascent = torch.sign(grad) if attack.norm == "Linf" else attack.normalize(grad)
        moved = within(x_adv + step_size * ascent)
        moved = within(x_adv + (moved - x_adv) * share + momentum * (1 - share))
        logits, loss, grad = self._climb(attack.loss, moved, y, target)
        fooled = (logits.max(1)[1] != y).view(-1, 1, 1, 1)
        better = loss > loss_best
        images = better.view(-1, 1, 1, 1)
        return (
            moved,
            x_adv.clone(),
            grad,
            torch.where(images, moved, x_best),
            torch.where(images, grad, grad_best),
            torch.where(better, loss, loss_best),
            torch.where(fooled, moved, fooling),
            right & ~fooled.flatten(),
            loss,
        )

    def _climb(self, name: str, images: Tensor, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, the loss of each image, and its gradient."""
        images = images.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.network(images)
            loss = LOSSES[name](logits, y, target)
            (grad,) = torch.autograd.grad(loss.sum(), images)
        return logits.detach(), loss.detach(), grad

    # --- FAB ----------------------------------------------------------------------------------------------------------

    def fab(
        self, attack: Any, x: Tensor, y: Tensor, use_rand_start: bool = False, is_targeted: bool = True
    ) -> Tensor:
        """The nearest images found that fool the network, the images themselves where none was."""
        logits = attack.predict(x)
        right = (logits.max(1)[1] == y).nonzero().squeeze(1)
        if not len(right):
            return x
        target = logits.sort(dim=-1)[1][:, -attack.target_class][right]
        start, labels = x[right], y[right]
        while True:
            state = start, start, torch.full((len(start),), 1e10, device=x.device)
            unfinished = torch.zeros((), dtype=torch.bool, device=x.device)
            for _ in range(attack.n_iter):
                *state, unfinished = self.replayed(
                    ("fab", attack.eta, attack.beta, attack.alpha_max, self.passes),
                    partial(self._fab_step, attack, self.passes),
                    (start, labels, target, *state, unfinished),
                )
            if not unfinished:
                break
            self.passes *= 2
        _, nearest, distance = state
        found = distance < 1e10
        adv = x.clone()
        adv[right[found]] = nearest[found]
        return adv

    def _fab_step(
        self,
        attack: Any,
        passes: int,
        start: Tensor,
        labels: Tensor,
        target: Tensor,
        x: Tensor,
        nearest: Tensor,
        distance: Tensor,
        unfinished: Tensor,
    ) -> tuple[Tensor, ...]:
        difference, gradient = self._fab_plane(x, labels, target)
        normals = gradient.flatten(1)
        offsets = -difference + (gradient * x).flatten(1).sum(-1)
        points = torch.cat((x.flatten(1), start.flatten(1)))
        steps, more = projection_linf_in(
            passes, points, torch.cat((normals, normals)), torch.cat((offsets, offsets))
        )
        length = steps.abs().max(1)[0].clamp(min=1e-8).view(2, -1, 1, 1, 1)
        step, step_of_start = steps.view(2, *x.shape)
        alpha = (length[0] / (length[0] + length[1])).clamp(0.0, attack.alpha_max)
        x = ((x + attack.eta * step) * (1 - alpha) + (start + step_of_start * attack.eta) * alpha).clamp(
            0.0, 1.0
        )
        fooled = self.network(x).max(1)[1] != labels
        far = (x - start).flatten(1).abs().max(1)[0]
        closer = fooled & (far < distance)
        return (
            torch.where(fooled.view(-1, 1, 1, 1), start + (x - start) * attack.beta, x),
            torch.where(closer.view(-1, 1, 1, 1), x, nearest),
            torch.where(closer, far, distance),
            unfinished | more,
        )

    def _fab_plane(self, images: Tensor, labels: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """How far the target's logit is above the label's, (B,), and its gradient."""
        images = images.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.network(images)
            difference = -(_of(logits, labels) - _of(logits, target))
            (grad,) = torch.autograd.grad(difference.sum(), images)
        return difference.detach(), grad

    def fab_planes(self, images: Tensor, labels: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The same in the shapes of the package's own loop: (B, 1) and (B, 1, 3, H, W)."""
        found = self.replayed("fab planes", self._fab_plane, (images, labels, target))
        difference, grad = (x[:, None].clone() for x in found)
        return difference, grad

    # --- Square -------------------------------------------------------------------------------------------------------

    def square(self, attack: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Margins and images after all queries, or when each image fools the network."""
        start = attack.random_choice([len(x), x.shape[1], 1, x.shape[3]])
        x_best = torch.clamp(x + attack.eps * start, 0.0, 1.0)
        margin, loss = attack.margin_and_loss(x_best, y)
        if (margin < 0.0).all():
            return margin, x_best
        windows = _windows(attack, x)
        done, left = 0, (margin > 0.0).nonzero().squeeze(1)
        while done < len(windows) and len(left):
            number = torch.tensor([done], device=x.device)
            state = x_best[left], margin[left], loss[left], number
            done = self._until_one_falls(
                self._square_step(attack.eps, x[left], y[left], windows, *state), state, len(windows)
            )
            x_best[left], margin[left], loss[left], _ = state
            left = left[margin[left] > 0.0]
        return margin, x_best

    def _until_one_falls(
        self, query: Callable[[], tuple[Tensor, ...]], state: tuple[Tensor, ...], total: int
    ) -> int:
        """Queries done when one image or more fell to the last, or all. The device is asked after 1, 2, 4, ... queries;
        where one fell before the last of them, they are taken back and done again."""
        _, margin, _, number = state
        self.packed += 1  # each packing's tensors are recorded anew
        done, block = int(number), 1
        while done < total:
            before = [tensor.clone() for tensor in state]
            block = min(block, total - done)
            for _ in range(block):
                self.replayed(("square", self.packed), query, ())
            if (margin > 0.0).all():
                done, block = done + block, min(2 * block, QUERIES)
            elif block == 1:
                return done + 1
            else:
                for tensor, held in zip(state, before, strict=True):
                    tensor.copy_(held)
                block = 1
        return done

    def _square_step(
        self,
        eps: float,
        x: Tensor,
        y: Tensor,
        windows: Tensor,
        x_best: Tensor,
        margin: Tensor,
        loss: Tensor,
        number: Tensor,
    ) -> Callable[[], tuple[Tensor, ...]]:
        """A query, which moves the last four tensors on in place."""
        low, high = x - eps, x + eps
        rows, columns = (torch.arange(size, device=x.device) for size in x.shape[2:])

        @torch.no_grad()
        def query() -> tuple[Tensor, ...]:
            top, left, size, *_ = window = windows.index_select(0, number)[0]
            inside = ((rows >= top) & (rows < top + size))[:, None] & (
                (columns >= left) & (columns < left + size)
            )
            moved = x_best + torch.where(inside, window[3:, None, None], 0.0)
            moved = torch.clamp(torch.min(torch.max(moved, low), high), 0.0, 1.0)
            logits = self.network(moved)
            found = _of(logits, y) - logits.scatter(1, y[:, None], -math.inf).max(-1)[0]
            improved = (found < loss).float()
            loss.copy_(improved * found + (1.0 - improved) * loss)
            improved = torch.max(improved, (found <= 0.0).float())
            margin.copy_(improved * found + (1.0 - improved) * margin)
            improved = improved.view(-1, 1, 1, 1)
            x_best.copy_(improved * moved + (1.0 - improved) * x_best)
            number.add_(1)
            return ()

        return query


def _windows(attack: Any, x: Tensor) -> Tensor:
    """Top, left, size and the change of each channel of each query's square, (queries, 3 + 3): the package's draws in its order."""
    channels, height, width = x.shape[1:]
    draws = torch.rand(attack.n_queries, 2 + channels)
    sides = (
        round(math.sqrt(attack.p_selection(number) * x[0].numel() / channels))
        for number in range(attack.n_queries)
    )
    sizes = [min(max(side, 1), height, width) for side in sides]
    size = torch.tensor(sizes, dtype=torch.float32)
    top, left = ((height - size) * draws[:, 0]).long(), ((width - size) * draws[:, 1]).long()
    change = 2.0 * attack.eps * torch.sign(2 * draws[:, 2:] - 1)
    return torch.cat((torch.stack((top, left, size), 1), change), 1).to(x.device)


def _of(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None]).squeeze(1)


def _cross_entropy(logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def _targeted_dlr(logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    ordered = logits.sort(dim=1)[0]
    scale = ordered[:, -1] - 0.5 * (ordered[:, -3] + ordered[:, -4]) + 1e-12
    return -(_of(logits, labels) - _of(logits, target)) / scale


LOSSES = {"ce": _cross_entropy, "dlr-targeted": _targeted_dlr}

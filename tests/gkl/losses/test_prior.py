"""The class prior, and the objectives that choose weights from it."""

import pytest
import torch
import torch.nn.functional as F

from gkl.losses.closed_form import gkl, gkl_loss, kl
from gkl.losses.objectives import GKL, KL
from gkl.losses.prior import KEPT, ClassPrior
from tests.gkl.losses.test_closed_form import algorithm1, logits


def test_prior_is_the_mean_prediction_of_each_class() -> None:
    prior = ClassPrior(num_classes=3, temperature=4.0)
    assert prior.probs.equal(torch.full((3, 3), 1 / 3))
    generator = torch.Generator().manual_seed(0)
    epoch = [
        (torch.randn(8, 3, generator=generator), torch.randint(3, (8,), generator=generator))
        for _ in range(4)
    ]
    for z, y in epoch:
        prior.update(z, y)
        assert prior.probs.equal(torch.full((3, 3), 1 / 3))  # this epoch's predictions count from the next on
    prior.renew()
    soft = F.softmax(torch.cat([z for z, _ in epoch]).double() / 4.0, -1)
    labels = torch.cat([y for _, y in epoch])
    for c in range(3):
        torch.testing.assert_close(prior.probs[c].double(), soft[labels == c].mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(prior.rows(labels, 0.4), prior[labels] ** 0.4)
    prior.update(*epoch[0])
    prior.renew()  # rows(., gamma) must not come from a table of the epoch before
    torch.testing.assert_close(prior.rows(labels, 0.4), prior[labels] ** 0.4)


def test_a_class_that_an_epoch_does_not_show_keeps_its_row() -> None:
    prior = ClassPrior(3)
    prior.update(torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([0]))
    prior.renew()
    assert prior.probs[1:].equal(torch.full((2, 3), 1 / 3)) and prior.probs[0, 0] > 0.99
    before = prior.probs.clone()
    prior.renew()  # an epoch without any sample
    assert prior.probs.equal(before) and prior.probs.isfinite().all()
    value = gkl(torch.randn(3, 3), torch.randn(3, 3), prior[torch.arange(3)], alpha=20.0, beta=4.0, gamma=0.4)
    assert value.isfinite()


def test_prior_resumes_in_the_middle_of_an_epoch() -> None:
    one, other = ClassPrior(3), ClassPrior(3)
    one.rows(torch.tensor([0]), 0.4)
    one.update(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    other.load_state_dict(one.state_dict())
    one.renew(), other.renew()
    assert one.probs.equal(other.probs)


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
def test_a_new_epoch_and_a_loaded_one_are_in_the_tensors_of_the_old(gamma: float) -> None:
    """What a captured CUDA graph reads: the very storage of the buffers, of the table and of its sums."""
    prior, other, labels = ClassPrior(3), ClassPrior(3), torch.tensor([0, 1, 2, 0])

    def places() -> list[int]:
        return [x.data_ptr() for x in (prior.probs, prior.sums, prior.counts, *prior.table(gamma))]

    before = places()
    for seed, change in enumerate((prior.renew, lambda: prior.load_state_dict(other.state_dict()))):
        for each in (prior, other):
            each.update(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)), labels)
        other.renew()
        change()
        assert prior.probs.equal(other.probs) and places() == before
        torch.testing.assert_close(prior.rows(labels, gamma), prior.probs[labels] ** gamma)
        torch.testing.assert_close(prior.totals(labels, gamma), (prior.probs**gamma).sum(1)[labels])


def test_a_prior_that_moves_smooths_anew() -> None:
    prior, labels = ClassPrior(3), torch.tensor([0, 2])
    prior.update(torch.randn(2, 3), labels)
    prior.renew()
    assert prior.rows(labels, 0.4).dtype == torch.float32
    prior.double()
    assert prior.rows(labels, 0.4).equal((prior.probs[labels].log() * 0.4).exp())
    assert prior.totals(labels, 0.4).dtype == torch.float64


@pytest.mark.parametrize("weights", ["class", "sample"])
@pytest.mark.parametrize("group_size", [0, 4])
def test_a_step_reads_nothing_back_from_its_device(
    weights: str, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors without values: whatever asks for one, or makes a shape of one, raises."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # it knows no meta device
    with torch.device("meta"):
        prior = ClassPrior(10)
        student, teacher = (torch.empty(8, 10, requires_grad=True) for _ in range(2))
        labels = torch.empty(8, dtype=torch.int64)
    objective = GKL(alpha=20.0, beta=4.0, gamma=0.4, weights=weights)
    objective(student, teacher, labels, prior, group_size).sum().backward()
    prior.update(teacher.detach(), labels)
    prior.update(teacher.detach(), labels, counted=labels > 0)
    prior.renew()
    assert student.grad is not None and prior.rows(labels, 0.4).shape == (8, 10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p[torch.tensor([3])], r"labels must lie in 0\.\.2, got 3\.\.3"),
        (lambda p: p.update(torch.zeros(1, 3), torch.tensor([-1])), "got -1..-1"),
        (lambda p: p.update(torch.zeros(2, 3), torch.tensor([0])), r"logits \(1, 3\), got \(2, 3\)"),
        (lambda p: ClassPrior(1), "at least 2 classes"),
        (lambda p: ClassPrior(3.0), "num_classes must be an integer, got 3.0"),
        (lambda p: ClassPrior(3, temperature=0.0), "temperature above 0"),
    ],
)
def test_prior_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(ClassPrior(3))


def test_a_gamma_in_a_tensor_is_read_each_time() -> None:
    """Its table was once kept under the tensor, whatever number it came to hold, and another for each new tensor."""
    prior, gamma, labels = ClassPrior(4), torch.tensor(0.5), torch.arange(4)
    student, teacher = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    prior.update(teacher, labels)
    prior.renew()
    for now in (0.5, 1.0, 0.25):
        gamma.fill_(now)
        wanted, found = (
            gkl_loss(student, teacher, prior.at(labels), alpha=1.0, beta=1.0, gamma=g) for g in (now, gamma)
        )
        assert found.equal(wanted)
        assert prior.rows(labels, gamma).equal(prior.rows(labels, now))


def test_a_gamma_that_is_ramped_keeps_no_table_a_step() -> None:
    prior = ClassPrior(4)
    prior.probs.copy_(torch.randn(4, 4).softmax(1))
    for gamma in torch.linspace(0, 1, 100).tolist():
        torch.testing.assert_close(prior.table(gamma)[0], prior.probs**gamma)
    assert len(prior._smoothed) == KEPT


def test_a_prior_made_in_inference_mode_is_trained_with() -> None:
    with torch.inference_mode():
        prior = ClassPrior(3)
    prior.update(torch.randn(3, 3), torch.arange(3))
    prior.renew()
    student = torch.randn(3, 3, requires_grad=True)
    gkl_loss(student, torch.randn(3, 3), prior.at(torch.arange(3)), alpha=1.0, beta=1.0, gamma=0.4).backward()


# --- objectives -------------------------------------------------------------------------------------------------------


def test_objectives_are_the_losses_with_their_weights_chosen() -> None:
    student, teacher = (x.detach() for x in logits(6, 4))
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    prior = ClassPrior(4).double()
    prior.update(5 * teacher, labels)
    prior.renew()
    options = {"alpha": 20.0, "beta": 4.0, "gamma": 0.4, "temperature": 2.0}
    for weights, rows in (("class", prior[labels]), ("sample", F.softmax(teacher, -1))):
        value = GKL(**options, weights=weights)(student, teacher, labels, prior)
        torch.testing.assert_close(
            value, gkl(student, teacher, rows, **options, reduction="none"), rtol=1e-9, atol=1e-9
        )
        torch.testing.assert_close(
            value.mean(), algorithm1(student, teacher, rows, 20.0, 4.0, 0.4, 2.0), rtol=1e-9, atol=1e-9
        )
    torch.testing.assert_close(
        KL(9.0, temperature=2.0)(student, teacher, labels, prior),
        9.0 * kl(student, teacher, temperature=2.0, reduction="none"),
    )
    with pytest.raises(ValueError, match="class or sample, got 'global'"):
        GKL(**options, weights="global")
    with pytest.raises(ValueError, match=r"loss.gamma must lie in \[0, 1\], got 2"):
        GKL(alpha=1.0, beta=1.0, gamma=2.0)

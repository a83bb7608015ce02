"""Recorded work: the keys, the failures, and whole training steps replayed on the CPU, bit for bit what they are without."""

import pytest
import torch
from tape import Taped


def test_a_key_is_run_then_recorded_then_replayed_with_the_same_bits() -> None:
    weight = torch.randn(4, 3, requires_grad=True)
    taped = Taped()

    def step(x: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = (x @ weight).relu().square().sum()
        (grad,) = torch.autograd.grad(loss, weight)
        with torch.no_grad():
            weight.sub_(0.01 * grad)
        return {"loss": loss}

    other = weight.detach().clone().requires_grad_()
    for number in range(5):
        x = torch.randn(2, 4)
        found = taped("step", step, (x,))["loss"].clone()
        loss = (x @ other).relu().square().sum()
        (grad,) = torch.autograd.grad(loss, other)
        other = (other.detach() - 0.01 * grad).requires_grad_()
        assert found.equal(loss.detach()) and weight.equal(other) and not found.requires_grad
        assert (taped.recorded, taped.replayed) == (min(number, 1), number)


def test_keys_and_shapes_have_recordings_of_their_own_and_the_oldest_goes() -> None:
    taped = Taped(kept=2)

    def scaled(by: float):
        return lambda x: [x * by]

    for _ in range(3):
        for by in (1.0, 2.0):
            assert taped(by, scaled(by), (torch.ones(3),))[0].equal(torch.full((3,), by))
    assert taped.recorded == 2
    taped(1.0, scaled(1.0), (torch.ones(4),))
    assert len(taped.known) == 2


def test_what_cannot_be_recorded_is_told_once_and_computed_all_the_same() -> None:
    told: list[str] = []
    taped = Taped(warn=told.append)
    state = torch.zeros(1)

    def step(x: torch.Tensor) -> tuple[torch.Tensor]:
        state.add_(1)
        return (x * float(x.sum()),)  # reads a value back

    for _ in range(4):
        assert taped("key", step, (torch.ones(2),))[0].equal(torch.full((2,), 2.0))
    assert state.item() == 4.0
    assert len(told) == 1 and "cannot be recorded" in told[0] and "not permitted" in told[0]


@pytest.mark.parametrize("number", [1.0, 2.0])
def test_a_number_that_python_holds_is_part_of_the_recording(number: float) -> None:
    """Why keys must name them."""
    taped, held = Taped(), {"by": number}
    for _ in range(2):
        taped("key", lambda x: [x * held["by"]], (torch.ones(1),))
    held["by"] = 5.0
    assert taped("key", lambda x: [x * held["by"]], (torch.ones(1),))[0].item() == number

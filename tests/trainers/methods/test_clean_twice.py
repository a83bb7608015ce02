"""TRADES-AWP's script computes the clean logits once for each term of its loss: batch norm's running statistics see them twice."""

import torch
import torch.nn.functional as F

from gkl.data.digits import digits
from gkl.models import create
from trainers.runs.compose import compose
from trainers.runs.settings import build


def test_running_statistics_are_those_of_three_forwards() -> None:
    """A step of Wu et al.'s trades_AWP/train_trades_cifar.py in a straight line, without AWP, in float64."""
    words = [
        "experiment=at/c10_trades_awp",
        "scale=smoke",
        "precision=float64",
        "method.awp_gamma=0",
        "device=cpu",
    ]
    config = compose("train", [*words, "augment.padding=0", "batch_size=16"])
    assert config["method"]["clean_twice"] is True
    assert compose("train", [*words, "protocol=paper"])["method"]["clean_twice"] is False
    torch.manual_seed(0)
    task = build(config, device=torch.device("cpu"), data=digits(), model=create("wrn_10_1", 10))
    reference = create("wrn_10_1", 10).double()
    reference.load_state_dict(task.model.state_dict())
    task.start_epoch(1)
    images, draws, y, view, keys = task.method.inputs(task.batch(1, 0), 1, 0)
    x = task.see(images, view, draws)
    task.samples = 16
    x_adv = task.method.views.adversarial(x, y, keys)
    task.train_step(1, 0)

    reference.train()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    logits_adv = reference(x_adv)
    robust = F.kl_div(F.log_softmax(logits_adv, 1), F.softmax(reference(x), 1), reduction="batchmean")
    loss = F.cross_entropy(reference(x), y) + 6.0 * robust
    loss.backward()
    optimizer.step()
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(
            task.model.state_dict()[name].to(value.dtype), value, rtol=1e-9, atol=1e-11
        )


def test_no_share_held_out_is_no_error() -> None:
    """Once an IndexError."""
    config = compose("train", ["experiment=at/c100_acat", "scale=smoke", "held_out=0.0", "device=cpu"])
    task = build(config, device=torch.device("cpu"), data=digits(), model=create("wrn_10_1", 10))
    assert not len(task.batches.held_out) and len(task.batches.labels) == 1437

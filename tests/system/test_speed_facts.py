"""What makes a step fast, as facts that need no clock: the passes it takes, what it leaves out, that compiling changes nothing."""

from collections import defaultdict
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode

from gkl.models.batch_norm import frozen_parameters
from gkl.models.wide_resnet import WideResNet
from tests.trainers.methods.test_adversarial import task_of
from trainers.runs.targets import locate


class Passes(TorchDispatchMode):
    """Counts pictures through each convolution: forward 1, gradient to its input 1, gradient to its weight 1.

    counts: by name of the network and the weight's place in it. A copy that a method makes of a network counts as
    `copies`; -1 is AutoAugment's sharpness.
    """

    def __init__(self, networks: dict[str, nn.Module]) -> None:
        super().__init__()
        self.counts: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0, 0])
        self.places: dict[int, tuple[str, int]] = {}
        self.copies: dict[torch.Size, int] = {}
        for name, network in networks.items():
            for place, module in enumerate(m for m in network.modules() if isinstance(m, nn.Conv2d)):
                self.places[module.weight.data_ptr()] = (name, place)
                self.copies.setdefault(module.weight.shape, place)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.add(args[1], len(args[0]), (True, False, False))
        elif func is torch.ops.aten.convolution_backward.default:
            self.add(args[2], len(args[0]), (False, *args[-1][:2]))
        return func(*args, **(kwargs or {}))

    def add(self, weight: Tensor, pictures: int, done: tuple[bool, ...]) -> None:
        place = self.places.get(weight.data_ptr(), ("copies", self.copies.get(weight.shape, -1)))
        for kind, was in enumerate(done):
            self.counts[place][kind] += pictures * was


def passes(task: Any, networks: dict[str, nn.Module], epoch: int, steps: int = 1) -> Passes:
    task.start_epoch(epoch)
    with Passes(networks) as counter:
        for step in range(steps):
            task.train_step(epoch, step)
    return counter


@pytest.mark.parametrize("loss", ["basic_gkl", "basic_kl"])
@pytest.mark.parametrize(("phases", "attack_steps"), [("low", 2), ("executed", 5), ("ten", 10)])
@pytest.mark.parametrize("awp", [True, False])
def test_a_step_takes_2k_plus_13_forwards(loss: str, phases: str, attack_steps: int, awp: bool) -> None:
    """2 K + 7 without AWP. The clean logits once and without graph, no weight gradient in the attack, no proxy network.

    Gradients to the picture are needed in the attack alone: the first convolution is spared those of AWP and the update.
    """
    _, task = task_of(f"at/c100_{loss}", "epochs=200", f"attack.phases={phases}")
    start = task.method.awp_start_epoch
    epoch = start if awp else start - 1
    counts = passes(task, {"model": task.model}, epoch).counts
    updates = (
        4 if awp else 2
    )  # batches that go forward and back again for the weights: two of AWP, two of the step
    attack = [attack_steps + 1, attack_steps, 0]
    expected = {
        ("model", place): [32 * (attack[0] + updates), 32 * (attack[1] + place * updates), 32 * updates]
        for place in (0, 1)
    }
    assert counts == expected
    assert sum(counts["model", 1]) == 32 * (2 * attack_steps + (13 if awp else 7))


METHODS = [
    "c100_basic_gkl", "c100_basic_kl", "c100_autoaug", "c100_acat", "c100_dajat", "c10_dajat", "c100_dm", "c10_rice", "c100_awp",
    "c10_trades_awp", "c100_lbgat", "c100_lbgat_awp", "c100_las_at", "c10_las_at",
]  # fmt: skip


@pytest.mark.parametrize("epoch", [5, 60])
@pytest.mark.parametrize("experiment", METHODS)
def test_the_plan_counts_what_a_step_takes(experiment: str, epoch: int, tmp_path: Any) -> None:
    """Each method's `forwards`, which GPU-hours are made of, against its steps: every convolution but the first."""
    own = [f"generated.root={tmp_path}"] if experiment == "c100_dm" else []
    if "las_at" in experiment:  # a batch takes the longest strategy that is drawn: let there be one
        own = ["method.steps=[3]", "method.interval=2"]
    config, task = task_of(f"at/{experiment}", "epochs=200", *own)
    networks = {"model": task.model}
    for name, attribute in (("natural_model", "guide"), ("strategy_model", "strategy")):
        if hasattr(task.method, attribute):
            networks[name] = getattr(task.method, attribute)
    steps = 2
    counts = passes(task, networks, epoch, steps).counts
    pictures = sum(task.batches.samples(step) for step in range(steps))
    expected = locate(config["method"]["_target_"]).forwards(config, epoch, task.method.budget["steps"])
    for network, each in expected.items():
        last = max(place for name, place in counts if name == network)
        total = sum(counts[network, last])
        if network == "model":
            total += sum(counts.get(("copies", last), ()))
        assert total == each * pictures, network


@pytest.mark.parametrize("experiment", ["c100_basic_gkl", "c100_dm", "c10_rice", "c100_las_at"])
def test_the_attack_needs_no_gradient_of_the_weights(experiment: str, tmp_path: Any) -> None:
    """Whatever batch norm does meanwhile. The images are those of an attack that keeps everything, to the bit."""
    own = [f"generated.root={tmp_path}"] if experiment == "c100_dm" else []
    own += ["method.interval=1"] if experiment == "c100_las_at" else []
    _, task = task_of(f"at/{experiment}", "epochs=200", *own)
    task.start_epoch(60)
    needed = []
    task.model.conv2.register_forward_pre_hook(
        lambda layer, inputs: needed.append(
            (torch.is_grad_enabled(), inputs[0].requires_grad, layer.weight.requires_grad)
        )
    )
    task.train_step(60, 0)
    attack = [weight for grad, images, weight in needed if grad and images and not weight]
    assert len(attack) >= task.method.budget["steps"]
    assert all(p.requires_grad for p in task.model.parameters())

    images, draws, y, view, index = task.batch(60, 0)
    x, keys = task.see(images, view, draws), task.method.start_keys(60, index) + view

    def loss(logits: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, y, reduction="none")

    def failing(logits: Tensor) -> Tensor:
        assert not any(p.requires_grad for p in task.model.parameters())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        task.method.perturb(x, failing, keys)
    assert all(p.requires_grad for p in task.model.parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainers.methods.robust.frozen_parameters", nullcontext)
        kept = task.method.perturb(x, loss, keys)
    assert task.method.perturb(x, loss, keys).equal(kept)


def test_compiled_with_frozen_parameters_less_is_kept_for_the_backward_pass() -> None:
    """By the partition that inductor's graphs have, too; torch's own convolution keeps its input whether it is needed or not."""
    model = WideResNet(10, 1, num_classes=5).eval()
    compiled = torch.compile(model, backend="aot_eager_decomp_partition")
    kept = []
    for context in (nullcontext, frozen_parameters):
        x, sizes = torch.rand(4, 3, 16, 16, requires_grad=True), list[int]()

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with context(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            compiled(x)
        kept.append(sum(sizes))
    assert kept[1] < 0.8 * kept[0]


OTHERS = ("c100_autoaug", "c100_dajat", "c100_dm", "c10_rice", "c100_lbgat_awp")


@pytest.mark.parametrize(
    "experiment",
    ["c100_basic_gkl", "c100_las_at", *(pytest.param(other, marks=pytest.mark.long) for other in OTHERS)],
)
def test_compiling_changes_no_step_and_settles(
    experiment: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two whole steps of each kind of method in float64, then no new graph: not by mode, not by a shorter last batch again."""
    own = [f"generated.root={tmp_path}"] if experiment == "c100_dm" else []
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()
    tasks = [task_of(f"at/{experiment}", "epochs=200", f"compile={on}", *own)[1] for on in ("false", "true")]
    for task in tasks:
        task.start_epoch(60)
        for step in range(2):
            task.train_step(60, step)
        task.train_step(60, task.steps_per_epoch - 1)
    compiled = tasks[1].model.state_dict()
    for name, value in tasks[0].model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(compiled[name], value, rtol=0, atol=1e-12, msg=name)
    assert graphs
    settled = len(graphs)
    tasks[1].start_epoch(61)
    for step in (0, tasks[1].steps_per_epoch - 1):
        tasks[1].train_step(61, step)
    assert len(graphs) == settled

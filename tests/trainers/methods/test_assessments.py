"""Further evaluations of a run's weights, and the figures drawn from them."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from gkl.data.content import listing
from gkl.data.digits import digits, digits_files
from gkl.evaluation import pgd_robust
from gkl.models import create
from gkl.models.own import OwnNetwork
from tests.trainers.runs.test_records_and_tables import record
from trainers.errors import ConfigError
from trainers.loop.console import Console
from trainers.methods.assessments import Attacks, Epsilons, Structure, Subject, class_means, margins
from trainers.methods.file_assessments import ClassScores, Renditions
from trainers.reports.figures import FORMATS, draw, save
from trainers.reports.tables import build, markdown
from trainers.runs.compose import compose
from trainers.runs.identity import assessed_with
from trainers.runs.plan import Cell, load_table
from trainers.runs.records import assessment_path, read_records, write_assessment, write_record
from trainers.runs.settings import check
from trainers.runs.targets import instantiate


def subject(folder: Path) -> Subject:
    """A WRN-10-1 that a few epochs of plain training have taught the digits: right, and easily attacked."""
    torch.manual_seed(0)
    data, model = digits(), create("wrn_10_1", num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = data.train_images.float() / 255, data.train_labels
    for _ in range(3):
        for index in torch.randperm(len(y)).split(128):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    settings = {
        "version": "standard",
        "norm": "linf",
        "epsilon": 0.05,
        "images": 10,
        "batch_size": 200,
        "seed": 0,
    }
    return Subject(model.eval(), data, settings, folder, torch.device("cpu"), Console("test", enabled=False))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject(tmp_path_factory.mktemp("autoattack"))


def test_margins_are_equation_14_class_by_class() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.softmax(torch.randn(60, 4, generator=generator, dtype=torch.float64), -1)
    labels = torch.arange(60) % 4
    means = class_means(probs, labels, 4)
    for y in range(4):
        mean = probs[labels == y].mean(0)
        torch.testing.assert_close(means[y], mean)
        wanted = mean[y] - max(float(mean[k]) for k in range(4) if k != y)
        assert float(margins(means)[y]) == pytest.approx(float(wanted), abs=1e-15)


@pytest.mark.long  # AutoAttack at six radii
def test_wider_balls_leave_fewer_and_the_average_is_theirs(trained: Subject) -> None:
    metrics, details = Epsilons("epsilons", [2, 8])(trained)
    assert metrics.keys() == {"aa_2", "aa_8", "aa_average"} and details == {"n": 10}
    assert metrics["aa_2"] >= metrics["aa_8"]
    assert metrics["aa_average"] == pytest.approx((metrics["aa_2"] + metrics["aa_8"]) / 2)


@pytest.mark.long  # AutoAttack twice
def test_worst_is_the_worst_for_each_image(trained: Subject) -> None:
    metrics, _ = Attacks("attacks", [10, 20])(trained)
    assert metrics.keys() == {"pgd10", "pgd20", "cw10", "cw20", "worst"}
    autoattack, _ = Epsilons("epsilons", [8])(trained)
    assert metrics["worst"] <= min(*metrics.values(), autoattack["aa_8"])
    chosen = trained.attacked()
    alone = pgd_robust(
        trained.model, trained.data.test_images[chosen], trained.data.test_labels[chosen], epsilon=0.05,
        step_size=0.0125, steps=20, loss="cw", batch_size=3, device=torch.device("cpu"),
    )  # fmt: skip
    assert metrics["cw20"] == pytest.approx(100 * alone.double().mean().item())


def test_the_screens_numbers_have_their_own_names(trained: Subject) -> None:
    screened = replace(trained, settings={**trained.settings, "version": "screen"})
    assert Epsilons("epsilons", [8])(screened)[0].keys() == {"screen_8", "screen_average"}
    assert Attacks("attacks", [10])(screened)[0].keys() == {"pgd10", "cw10", "worst_screen"}


def test_structure_and_figure_4(trained: Subject, tmp_path: Path) -> None:
    metrics, details = Structure("structure", classes=4, images=40, steps=3, perplexity=30.0)(trained)
    assert metrics == {} and len(details["margins"]) == 10 and len(details["classes"]) == 4
    assert len(details["points"]) == 80 and {p[2] for p in details["points"]} == set(details["classes"])
    assert [p[3] for p in details["points"]] == [0] * 40 + [1] * 40

    figure = load_table("4", "figure")
    records = []
    for row, shift in (("at/c100_basic_gkl", 0.1), ("at/c100_basic_kl", 0.0)):
        config = compose("train", [f"experiment={row}", "scale=smoke"])
        moved = {**details, "margins": [m + shift for m in details["margins"]]}
        records.append({
            "experiment": row, "scale": "smoke", "protocol": "official", "seed": 0, "status": "done", "config": config,
            "config_hash": "0", "changed": {}, "finished": "2026-01-31T12:00:00Z",
            "metrics": {"clean": 90.0, "aa": 50.0}, "departures": {}, "evaluation": {"n": 60},
            "data": {"name": "digits", "stand_in_for": "cifar100", "train": 1437, "test": 360},
            "assessments": {"structure": {"details": moved}},
        })  # fmt: skip

    def drawn(some: list[dict]) -> object:
        built = build(figure, some, scale="smoke", protocol="official", claims={})
        return draw("structure", built)

    picture = drawn(records)
    titles = [axes.get_title() for axes in picture.axes]
    assert titles[0].startswith("(a) GKL-AT") and titles[1].startswith("(b) TRADES")
    assert "10 of 10 classes positive" in titles[2] and "digits for cifar100" in picture.get_suptitle()
    for kind in FORMATS:
        twice = [tmp_path / f"{n}.{kind}" for n in range(2)]
        for path in twice:
            save(picture, path, kind)
        assert twice[0].read_bytes() == twice[1].read_bytes()
    assert drawn(records[:1]) is None  # one method alone is no comparison
    with pytest.raises(
        ValueError,
        match="figures are clean_against_aa, structure, class_scores, ablation, segmentations, questions, gradient_paths, got 'figure9'",
    ):
        draw("figure9", None)


def test_figure_1_shows_the_papers_values_and_ours() -> None:
    figure = load_table("1", "figure")
    config = compose("train", ["experiment=at/c100_basic_gkl", "scale=smoke"])
    record = {
        "experiment": "at/c100_basic_gkl", "scale": "smoke", "protocol": "official", "seed": 0, "status": "done",
        "config_hash": "0", "changed": {}, "finished": "2026-01-31T12:00:00Z",
        "config": config, "metrics": {"clean": 93.0, "aa": 41.0}, "departures": {}, "evaluation": {"n": 60},
        "data": {"name": "digits", "stand_in_for": "cifar100", "train": 1437, "test": 360}, "assessments": {},
    }  # fmt: skip
    built = build(figure, [record], scale="smoke", protocol="official", claims={})
    picture = draw("clean_against_aa", built)
    left, right, key = picture.axes
    assert {(float(p.get_xdata()[0]), float(p.get_ydata()[0])) for p in right.lines} == {(93.0, 41.0)}
    printed = {(float(p.get_xdata()[0]), float(p.get_ydata()[0])) for p in left.lines}
    assert (65.76, 31.91) in printed and (72.58, 38.83) in printed and len(printed) == 10
    assert [text.get_text().split("  ", 1)[1] for text in key.texts][:2] == ["AWP", "LBGAT"]
    assert [text.get_text() for text in right.texts] == ["6"]  # GKL-AT is the sixth row
    assert draw("clean_against_aa", build(figure, [], scale="smoke", protocol="official", claims={})) is None


def test_an_assessment_lies_beside_its_record_and_belongs_to_its_weights(tmp_path: Path) -> None:
    from tests.trainers.runs.test_records_and_tables import record
    from trainers.errors import RunError
    from trainers.runs.records import write_record

    path = write_record(tmp_path, record(30.0))
    made = {
        "assessment": "attacks", "settings": {"steps": [10]}, "checkpoint": "0", "metrics": {"pgd10": 44.0}, "details": {},
        "code": {}, "versions": {}, "hardware": {}, "cost": {}, "finished": "2026-01-31T12:00:00Z",
    }  # fmt: skip
    assert write_assessment(path, made) == assessment_path(path, "attacks")
    (read,) = read_records(tmp_path)
    assert read["metrics"]["pgd10"] == 44.0 and read["assessments"]["attacks"]["settings"] == {"steps": [10]}
    with pytest.raises(RunError, match="never changed"):
        write_assessment(path, {**made, "metrics": {"pgd10": 45.0}})
    with pytest.raises(ValueError, match="must be a percentage"):
        write_assessment(path, {**made, "metrics": {"pgd10": 145.0}})
    assessment_path(path, "attacks").unlink()
    write_assessment(path, {**made, "checkpoint": "of another run"})
    (read,) = read_records(tmp_path)
    assert "pgd10" not in read["metrics"] and read["assessments"] == {}


def test_table_15_shows_metrics_of_assessments() -> None:
    table = load_table("15")
    config = compose("train", ["experiment=at/c100_basic_kl", "scale=smoke"])
    made = {
        "experiment": "at/c100_basic_kl", "scale": "smoke", "protocol": "official", "seed": 0, "status": "done",
        "config_hash": "0", "changed": {}, "finished": "2026-01-31T12:00:00Z", "path": "x", "code": {},
        "hardware": {"count": 1, "name": "cpu"}, "cost": {"device_hours": 1.0},
        "config": config, "metrics": {"clean": 93.0, "aa": 41.0, "pgd10": 55.0}, "departures": {}, "evaluation": {"n": 60},
        "data": {"name": "digits", "stand_in_for": "cifar100", "train": 1437, "test": 360}, "assessments": {},
    }  # fmt: skip
    text = markdown(build(table, [made], scale="smoke", protocol="official", claims={}))
    (line,) = [line for line in text.splitlines() if line.startswith("| TRADES+AWP |")]
    assert "| 36.01 / 55.00 (1) |" in line and "| 35.84 / – |" in line and "some columns missing" in line


def test_an_assessment_of_other_settings_is_told_and_not_shown_in_their_place(tmp_path: Path) -> None:
    """Once assessment.eighths=[1,2] was told that this run is done, and shown six others."""

    def cell(*words: str) -> Cell:
        names = ["experiment=at/c100_basic_gkl", "scale=smoke", f"paths.results={tmp_path}", *words]
        return Cell("row", compose("train", names))

    usual = cell("assessment=epsilons")
    path = write_record(tmp_path / "runs", record(30.0))
    made = {
        "assessment": "epsilons", "settings": assessed_with(usual.config), "checkpoint": "0", "metrics": {}, "details": {},
        "code": {}, "versions": {}, "hardware": {}, "cost": {}, "finished": "2026-01-31T12:00:00Z",
    }  # fmt: skip
    write_assessment(path, made)
    assert (usual.status, usual.stale) == ("done", None)
    told = r"epsilons.json was measured with assessment.eighths=\[2, 4, 6, 8, 10, 12\], and \[1, 2\] is asked for; move it away"
    assert re.search(told, str(cell("assessment=epsilons", "assessment.eighths=[1,2]").stale))
    assessment_path(path, "epsilons").unlink()
    write_assessment(path, {**made, "settings": {}})  # of a time that knew none of them
    assert usual.stale is None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["assessment.name=mine"], "assessment.name is where tables look for its numbers"),
        (["assessment.eighths=[]"], r"assessment.eighths must be a list of whole numbers, got \[\]"),
        (
            ["assessment.eighths=[8,100]"],
            "100 eighths of evaluation.epsilon must be above 0 and at most 1, .* got 1.875",
        ),
    ],
)
def test_an_assessment_that_could_not_be_made_is_refused_before_the_training(
    words: list[str], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        check(
            compose("train", ["experiment=at/c100_basic_gkl", "scale=smoke", "assessment=epsilons", *words]),
            1,
        )


def test_renditions_are_known_by_their_pictures(tmp_path: Path) -> None:
    for name in ("renditions/a/0.png", "sketch/a/0.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"one")
    words = [
        "experiment=kd/in_vanilla",
        "model=resnet18",
        "scale=smoke",
        "assessment=renditions",
        f"assessment.root={tmp_path}",
    ]
    node = compose("train", words)["assessment"]
    assert node["content"] == listing(tmp_path / "renditions", tmp_path / "sketch") != None  # noqa: E711
    instantiate(node).check()
    (tmp_path / "sketch/a/0.png").write_bytes(b"another")
    with pytest.raises(
        ValueError, match="the pictures at .*renditions and .*sketch have changed since this run was started"
    ):
        instantiate(node).check()


def test_data_that_an_assessment_is_not_made_on_are_refused_before_the_training(tmp_path: Path) -> None:
    """Once an AttributeError after it."""
    root = tmp_path / "digits"
    files = digits_files(str(root), image_size=8, resize=None, decoder="pillow")
    structure = Structure("structure", classes=5, images=10, steps=1, perplexity=5.0)
    structure.check_data(digits())
    with pytest.raises(ValueError, match="assessment=structure needs pictures in memory .*, got digits"):
        structure.check_data(files)
    structure.check_network(create("wrn_10_1", 10))
    structure.check_network(create("resnet10t", 10))
    with pytest.raises(
        ValueError, match="structure embeds a network's features, and Linear shows its logits alone"
    ):
        structure.check_network(OwnNetwork(nn.Linear(3, 10), 10))
    ClassScores("class_scores").check_data(files)
    with pytest.raises(ValueError, match="assessment=class_scores needs pictures in files .*, got digits"):
        ClassScores("class_scores").check_data(digits())
    renditions = Renditions("renditions", str(root), "renditions", "sketch", classes=5)
    renditions.check_data(files)
    (root / "sketch/unheard of").mkdir()
    shutil.copy(next((root / "sketch").glob("*/*.png")), root / "sketch/unheard of/1.png")
    with pytest.raises(
        ValueError, match="sketch has 1 classes that the data set has not, the first is unheard of"
    ):
        renditions.check_data(files)

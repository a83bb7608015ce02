"""CLIP's networks and words: OpenCLIP's own, behind a normalisation."""

from pathlib import Path

import pytest
import torch

from gkl.data.tokens import (
    DIGIT_TEMPLATES,
    DIGITS,
    Words,
    bpe,
    every_text,
    imagenet_names,
    imagenet_templates,
    templates_of,
)
from gkl.evaluation.zero_shot import class_weights, predicted
from gkl.models import clip as module
from gkl.models import load_checkpoint
from gkl.models.clip import clip
from gkl.models.published import fetch, file_name
from trainers.runs.cost import forward_flops

open_clip = pytest.importorskip("open_clip", reason="needs open_clip_torch, the extra clip")


def test_features_are_openclip_s_of_its_own_preprocessing() -> None:
    """At ViT-B/32's shape of input, with OpenCLIP's mean and standard deviation."""
    from torchvision.transforms.v2.functional import normalize

    network = clip("clip_64px_128").double().eval()
    x, tokens = torch.rand(2, 3, 64, 64, dtype=torch.float64), bpe(32)(["a dog", "two cats on a mat"])
    images, texts = network(x, tokens)
    seen = normalize(x, list(open_clip.OPENAI_DATASET_MEAN), list(open_clip.OPENAI_DATASET_STD))
    theirs = network.model(seen, tokens)
    torch.testing.assert_close(images, theirs[0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(texts, theirs[1], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(2).double())


@pytest.mark.parametrize(
    ("name", "gigaflops", "millions"), [("ViT-B-16", 41.1, 149.6), ("ViT-L-14", 175.3, 427.6)]
)
def test_the_paper_s_networks(name: str, gigaflops: float, millions: float) -> None:
    with torch.device("meta"):
        network = clip(name)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    node = {"_target_": "model/clip", "name": name}
    assert forward_flops(node, 224, 1000) / 1e9 == pytest.approx(gigaflops, abs=0.1)
    network.check_fits(bpe(77), 224)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_of_openclip_s_is_read_without_running_anything(suffix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(1)
    theirs = open_clip.CLIP(**module.NETWORKS["clip_scan_48"])
    file = tmp_path / f"net{suffix}"
    save_file(theirs.state_dict(), file) if suffix == ".safetensors" else torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, file
    )
    network = clip("clip_scan_48")
    report = load_checkpoint(network, file)
    assert report.fits and all(network.model.state_dict()[k].equal(v) for k, v in theirs.state_dict().items())
    torch.save(network.state_dict(), tmp_path / "own.pt")  # as our runs leave it
    assert load_checkpoint(clip("clip_scan_48"), tmp_path / "own.pt").fits
    with pytest.raises(ValueError, match="does not fit the Clip"):
        load_checkpoint(clip("clip_scan_96"), file)


def test_published_weights_by_name(tmp_path: Path) -> None:
    assert file_name("open_clip/ViT-L-14/datacomp_xl_s13b_b90k") == Path("ViT-L-14-datacomp_xl_s13b_b90k.pt")
    with pytest.raises(ValueError, match="has no weights datacomp_xxl of ViT-L-14; there are openai"):
        fetch("open_clip/ViT-L-14/datacomp_xxl", tmp_path / "never.pt")
    assert not list(tmp_path.iterdir())


def test_names_are_told_apart_by_their_place() -> None:
    names = imagenet_names()
    assert len(names) == 1000 and len({*names}) == 998 and len(imagenet_templates()) == 80
    assert (
        names[:2] == ("tench", "goldfish") and imagenet_templates()[0]("tench") == "a bad photo of a tench."
    )


def test_zero_shot_is_openclip_s() -> None:
    """Normalised, averaged, normalised again; 100 times the cosine; among a mask's classes alone."""
    from open_clip import build_zero_shot_classifier

    torch.manual_seed(0)
    network = clip("clip_64px_128").eval()
    names, templates, tokenizer = imagenet_names()[:23], imagenet_templates()[:7], bpe(32)
    weights = class_weights(network.text_features, tokenizer, names, templates, torch.device("cpu"))
    theirs = build_zero_shot_classifier(network.model, tokenizer, names, templates)
    assert weights.shape == (128, 23)
    torch.testing.assert_close(weights, theirs, rtol=0, atol=1e-6)
    features = network.image_features(torch.rand(9, 3, 64, 64)).detach()
    every = torch.ones(23, dtype=torch.bool)
    assert predicted(features, weights, every).equal((100.0 * features @ theirs).argmax(1))
    few = torch.arange(23) % 4 == 1
    known = few.nonzero().squeeze(1)
    assert predicted(features, weights, few).equal(known[(features @ theirs)[:, known].argmax(1)])


def test_one_word_one_token() -> None:
    texts = every_text(DIGITS, templates_of(DIGIT_TEMPLATES))
    words = Words(texts, 12)
    assert len(texts) == 80 and words.vocab_size == 44
    tokens = words(["A handwritten three", "the number two on white paper"])
    assert tokens.shape == (2, 12) and tokens[:, 0].tolist() == [1, 1]
    assert tokens.argmax(1).tolist() == [4, 7] and tokens.max() == 43  # where a tower reads
    assert words([" ".join(["one"] * 40)])[0, -1] == 43
    with pytest.raises(ValueError, match="does not know the word 'eleven'"):
        words(["a handwritten eleven"])
    with pytest.raises(
        ValueError, match="takes texts of 12 tokens out of 64, and data.tokenizer makes texts of 77"
    ):
        clip("clip_scan_48").check_fits(bpe(77), 8)
    with pytest.raises(ValueError, match="takes pictures of 8 pixels, got data.image_size=32"):
        clip("clip_scan_48").check_fits(words, 32)


def test_without_the_package_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.__dict__, "import_module", _missing)
    for make in (lambda: clip("ViT-B-16"), bpe, imagenet_names):
        with pytest.raises(ValueError, match=r"open_clip is missing: pip install 'gkl\[clip\]'"):
            make()


def _missing(name: str) -> None:
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

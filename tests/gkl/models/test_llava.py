"""LLaVA's network against transformers' own, what is kept of it, its dropout, its answers; language models in folders."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("open_clip", reason="needs open_clip_torch, the extra clip")
transformers = pytest.importorskip("transformers", reason="needs transformers, the extra llava")
pytest.importorskip("peft", reason="needs peft, the extra llava")

from gkl.data.conversations import IMAGE, check_tokenizer
from gkl.models import language
from gkl.models.clip import clip
from gkl.models.language import folder_tokenizer, llama, word_tokenizer, words_of
from gkl.models.llava import KeyedDropout, Llava, llava, set_text_keys
from gkl.rng import sample_keys

PLACES = 16


def network(seed: int = 0, tower: str = "clip_scan_96", dropout: float = 0.0) -> Llava:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = llava(clip(tower, normalisation=None), llama("llama_scan"), rank=4, alpha=8, dropout=dropout)
        for p in made.adapters():
            p.data = 0.05 * torch.randn_like(p)
    return made.double().eval()


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures, tokens, shown and there: a text with a picture, one without, a longer one with."""
    draw = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 8, 8, generator=draw, dtype=torch.float64)
    rows = [[5, *[IMAGE] * PLACES, 7, 9], [3, 4, 5, 6], [8, 2, *[IMAGE] * PLACES, 11, 12, 13]]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    there = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
    return images, tokens, torch.tensor([True, False, True]), there


def theirs(ours: Llava) -> Any:
    """transformers' LLaVA with the same weights, LoRA added to its matrices."""
    visual, spoken = ours.tower.model.visual, ours.language.model
    heads = visual.transformer.resblocks[0].attn.num_heads
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=96, intermediate_size=192, num_hidden_layers=len(visual.transformer.resblocks), num_attention_heads=heads,
            image_size=8, patch_size=2, hidden_act="gelu", projection_dim=96, attn_implementation="eager",
        ),
        text_config=spoken.config, image_token_index=127, projector_hidden_act="gelu",
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    made = transformers.LlavaForConditionalGeneration(config).double().eval()
    state: dict[str, Tensor] = {}
    at = "model.vision_tower.vision_model"
    state[f"{at}.embeddings.class_embedding"] = visual.class_embedding
    state[f"{at}.embeddings.patch_embedding.weight"] = visual.conv1.weight
    state[f"{at}.embeddings.position_embedding.weight"] = visual.positional_embedding
    for name, layer in (("pre_layrnorm", visual.ln_pre), ("post_layernorm", visual.ln_post)):
        state |= {f"{at}.{name}.{key}": value for key, value in layer.state_dict().items()}
    for number, block in enumerate(visual.transformer.resblocks):
        here = f"{at}.encoder.layers.{number}"
        for kind in ("weight", "bias"):
            parts = getattr(block.attn, f"in_proj_{kind}").chunk(3)
            for part, value in zip("qkv", parts, strict=True):
                state[f"{here}.self_attn.{part}_proj.{kind}"] = value
            pairs = (
                ("self_attn.out_proj", block.attn.out_proj),
                ("mlp.fc1", block.mlp.c_fc),
                ("mlp.fc2", block.mlp.c_proj),
                ("layer_norm1", block.ln_1),
                ("layer_norm2", block.ln_2),
            )
            state |= {f"{here}.{name}.{kind}": getattr(layer, kind) for name, layer in pairs}
    for name, layer in (("linear_1", ours.projector[0]), ("linear_2", ours.projector[2])):
        state |= {
            f"model.multi_modal_projector.{name}.{key}": value for key, value in layer.state_dict().items()
        }
    for name, module in spoken.named_modules():
        if (
            name
            and "lora" not in name
            and "base_layer" not in name
            and getattr(module, "weight", None) is not None
        ):
            weight = module.weight
            if hasattr(module, "lora_A"):
                weight = weight + 8 / 4 * module.lora_B["default"].weight @ module.lora_A["default"].weight
            state[name.replace("model.", "model.language_model.", 1) + ".weight"] = weight
    known = made.state_dict()
    renamed = {
        key if key in known else key.replace("vision_tower.vision_model", "vision_tower"): v
        for key, v in state.items()
    }
    made.load_state_dict(renamed, strict=True)
    return made


def test_it_is_transformers_own() -> None:
    """With adapters in use: layer -2 of the tower, no class token, two layers, pictures in their places."""
    ours = network()
    images, tokens, shown, there = batch()
    found = ours(images, tokens, shown)
    other = theirs(ours)
    with torch.no_grad():
        for row, picture in ((0, 0), (1, None), (2, 1)):
            ids = tokens[row][there[row]][None]
            given = {} if picture is None else {"pixel_values": images[picture : picture + 1]}
            expected = other(input_ids=ids.masked_fill(ids == IMAGE, 127), **given).logits[0]
            torch.testing.assert_close(found[row][there[row]], expected, rtol=1e-9, atol=1e-10)


def test_without_adapters_it_is_the_language_model() -> None:
    ours = network()
    plain = llama("llama_scan").double().eval()
    ours.begin_from(clip("clip_scan_96", normalisation=None), plain)
    ours.adapt(False)
    tokens = torch.tensor([[3, 4, 5, 6]])
    found = ours(torch.zeros(0, 3, 8, 8, dtype=torch.float64), tokens, torch.tensor([False]))
    torch.testing.assert_close(found, plain(plain.embed(tokens)), rtol=0, atol=0)
    ours.adapt(True)
    assert not found.equal(ours(torch.zeros(0, 3, 8, 8, dtype=torch.float64), tokens, torch.tensor([False])))
    with pytest.raises(RuntimeError, match="the language models differ in"):
        ours.begin_from(clip("clip_scan_96", normalisation=None), llama("llama_shapes"))


def test_what_is_frozen_is_in_no_state() -> None:
    ours, other = network(), network(seed=5)
    state = copy.deepcopy(ours.state_dict())
    lora = sum("lora_" in key for key in state)
    assert lora == 2 * 7 * 3 and len(state) == lora + 4  # seven linear layers in each of three blocks
    assert sum(v.numel() for v in state.values()) < 0.3 * sum(p.numel() for p in ours.parameters())
    before = [p.clone() for n, p in other.named_parameters() if "lora_" not in n and "projector" not in n]
    other.load_state_dict(state)
    assert all(other.state_dict()[key].equal(value) for key, value in state.items())
    after = [p for n, p in other.named_parameters() if "lora_" not in n and "projector" not in n]
    assert all(a.equal(b) for a, b in zip(before, after, strict=True))
    with pytest.raises(RuntimeError, match="differ in 1 names, such as projector.0.bias"):
        other.load_state_dict({key: value for key, value in state.items() if key != "projector.0.bias"})


def test_gradients_reach_what_learns_alone() -> None:
    ours = network().train()
    images, tokens, shown, there = batch()
    for tuning in (False, True):
        ours.adapt(tuning)
        ours.zero_grad()
        ours(images, tokens, shown)[there].square().mean().backward()
        for name, p in ours.named_parameters():
            learns = "projector" in name or (tuning and "lora_" in name)
            assert (p.grad is not None and bool(p.grad.abs().sum())) == learns, name


def test_a_batch_without_pictures_has_a_gradient_of_zero() -> None:
    """So that processes with and without pictures exchange the same gradients."""
    ours = network().train()
    tokens = torch.tensor([[3, 4, 5]])
    ours(torch.zeros(0, 3, 8, 8, dtype=torch.float64), tokens, torch.tensor([False])).mean().backward()
    assert all(p.grad is not None and not p.grad.any() for p in ours.projector.parameters())


def test_a_text_that_is_cut_within_its_picture_has_the_beginning_of_it() -> None:
    ours = network()
    image = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    tokens = torch.tensor([[5, *[IMAGE] * 3]])
    found = ours.embed(tokens, image, torch.tensor([True]))
    assert found[0, 1:].equal(ours.see(image)[0, :3])


def test_dropout_follows_from_keys_and_places() -> None:
    layer = KeyedDropout(0.25, number=3).train()
    x = torch.ones(4, 50, 8)
    keys = sample_keys(0, 1, torch.arange(4), "adapters")
    assert layer(x) is x  # no keys, no draws
    set_text_keys(nn.Sequential(layer), keys)
    whole = layer(x)
    assert whole.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (whole == 0).double().mean().item() == pytest.approx(0.25, abs=0.04)
    set_text_keys(nn.Sequential(layer), keys[2:3])
    assert layer(x[2:3, :20]).equal(whole[2:3, :20])  # whoever is beside it, and however much padding
    other = KeyedDropout(0.25, number=4).train()
    set_text_keys(nn.Sequential(other), keys)
    assert not other(x).equal(whole) and other.eval()(x) is x


def test_what_is_computed_again_has_the_same_gradients() -> None:
    images, tokens, shown, there = batch()
    found = []
    for again in (False, True):
        ours = network(dropout=0.3).train()
        calls: list[int] = []
        first = ours.language.model.model.layers[0].mlp
        first.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if again:
            ours.recompute()
        set_text_keys(ours, sample_keys(0, 1, torch.arange(3), "adapters"))
        ours(images, tokens, shown)[there].square().mean().backward()
        assert len(calls) == 1 + again
        found.append([p.grad for p in (*ours.projector.parameters(), *ours.adapters())])
    assert all(a is not None and b is not None and a.equal(b) for a, b in zip(*found, strict=True))


def test_answers_are_the_likeliest_tokens_one_by_one() -> None:
    ours = network()
    images, tokens, _, there = batch()
    texts = [
        ours.embed(tokens[n][there[n]][None], images[k : k + 1], torch.tensor([True]))[0]
        for n, k in ((0, 0), (2, 1))
    ]
    texts.append(ours.language.embed(tokens[1][there[1]][None])[0])
    with torch.no_grad():
        found = ours.language.answers(texts, end=1, at_most=6)
        for text, answer in zip(texts, found, strict=True):
            so_far, said = text[None], []
            for _ in range(6):
                token = int(ours.language(so_far)[0, -1].argmax())
                if token == 1:
                    break
                said.append(token)
                so_far = torch.cat([so_far, ours.language.embed(torch.tensor([[token]]))], dim=1)
            assert answer == said


def test_a_language_model_is_drawn_in_its_precision() -> None:
    """And not first in float32, of which 7B fill a card; the angles of its positions stay exact."""
    with torch.random.fork_rng(devices=[]):
        found = llama("llama_scan", dtype="bfloat16")
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in found.buffers()} == {torch.float32}


def test_language_models_from_folders(tmp_path: Path) -> None:
    whole = llama("llama_scan")
    whole.model.save_pretrained(tmp_path / "there")
    found = llama("mine", folder=str(tmp_path / "there"), dtype="bfloat16")
    assert found.name == "mine" and found.model.dtype == torch.bfloat16
    for (name, a), b in zip(whole.state_dict().items(), found.state_dict().values(), strict=True):
        assert a.bfloat16().equal(b), name
    with torch.device("meta"):  # a plan needs no weights
        assert llama("vicuna-7b", folder=str(tmp_path / "nowhere")).width == 4096
    described = json.loads((tmp_path / "there/config.json").read_text())
    cases = {
        "nothing": ({}, "no language model at .*nothing .config.json is missing"),
        "other": ({"config.json": json.dumps({"model_type": "gpt2"})}, "needs a language model of the LLaMA family, got 'gpt2'"),
        "cut": ({"config.json": "{"}, "is no whole JSON file"),
        "empty": ({"config.json": json.dumps(described)}, "the weights at .*empty cannot be read"),
    }  # fmt: skip
    for name, (files, message) in cases.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
        with pytest.raises(ValueError, match=message):
            llama("mine", folder=str(tmp_path / name))
    (tmp_path / "lacking").mkdir()
    (tmp_path / "lacking/config.json").write_text(json.dumps(described))
    from safetensors.torch import save_file

    state = {k: v.contiguous() for k, v in whole.model.state_dict().items() if "norm" not in k}
    save_file(state, tmp_path / "lacking/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 7 of the language model's weights, such as model"):
        llama("mine", folder=str(tmp_path / "lacking"))
    with pytest.raises(ValueError, match="no tokenizer at .*nothing"):
        folder_tokenizer(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="there is no language model 'vicuna-8b'; there are vicuna-7b"):
        llama("vicuna-8b")


def test_a_folder_s_tokenizer_is_read(tmp_path: Path) -> None:
    texts = ["which digit is this ?", "这是 three .\n"]
    made = word_tokenizer(words_of(texts))
    check_tokenizer(made)
    assert made.decode(made.encode(texts[1])).split() == ["这", "是", "three", "."]
    made.save_pretrained(tmp_path)
    again = folder_tokenizer(str(tmp_path))
    check_tokenizer(again)
    assert [again.encode(t) for t in texts] == [made.encode(t) for t in texts]


def test_a_tokenizer_that_does_not_fit_is_named() -> None:
    language = llama("llama_scan")
    language.check_fits(word_tokenizer(["a"]), 256)
    with pytest.raises(ValueError, match="llama_scan has 128 tokens, and the tokenizer 203"):
        language.check_fits(word_tokenizer([f"w{n}" for n in range(200)]), 256)
    with pytest.raises(ValueError, match="reads 256 tokens at most, got data.length=257"):
        language.check_fits(word_tokenizer(["a"]), 257)


def test_the_loss_ignores_padding() -> None:
    """Padding is on the right, and a causal model does not see it."""
    ours = network()
    images, tokens, shown, there = batch()
    longer = F.pad(tokens, (0, 4))
    a = ours(images, tokens, shown)
    b = ours(images, longer, shown)[:, : tokens.shape[1]]
    torch.testing.assert_close(a[there], b[there], rtol=1e-12, atol=1e-12)


def test_without_a_package_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(language, "import_module", missing)
    for name, make in {
        "transformers": language.transformers,
        "peft": language.peft,
        "tokenizers": lambda: word_tokenizer(["a"]),
    }.items():
        with pytest.raises(ValueError, match=rf"{name} is missing: pip install 'gkl\[llava\]'"):
            make()

"""LLaVA: a language model that is shown pictures (Liu et al. 2024).

    network = llava(tower=clip("ViT-B-16"), language=llama("vicuna-7b", folder), rank=128, alpha=256, dropout=0.05)
    logits = network(images, tokens, shown)                     # (B, L, V)

A picture's patches, as the layer before the last of a frozen CLIP sees them, go through a projector into the places that the
picture has among the words. The language model is frozen, too; LoRA (peft's) adapts it. state_dict has what is trained alone.
Source: LlavaMetaForCausalLM and find_all_linear_names of LLaVA at c121f04.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gkl.data.conversations import IMAGE
from gkl.models.clip import Clip
from gkl.models.language import TYPICAL_TOKENS, Language, peft
from gkl.rng import uniform

LAYER = -2  # of the tower


class Llava(nn.Module):
    """tower and language: frozen. projector: two layers. The adapters are part of `language`."""

    def __init__(self, tower: Clip, language: Language) -> None:
        super().__init__()
        self.tower, self.language = tower, language
        self.tower_width = int(tower.model.visual.transformer.width)
        self.projector = nn.Sequential(
            nn.Linear(self.tower_width, language.width), nn.GELU(), nn.Linear(language.width, language.width)
        )

    @property
    def image_size(self) -> int:
        """Pixels a side that its pictures have."""
        return self.tower.image_size

    @property
    def places(self) -> int:
        """That a picture takes among the words."""
        return int(self.tower.model.visual.grid_size[0] * self.tower.model.visual.grid_size[1])

    def see(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> embeddings (B, places, D); no gradient reaches the tower."""
        with torch.no_grad():
            seen = self.tower.model.visual.forward_intermediates(
                self.tower.normalise(x), indices=[LAYER], intermediates_only=True, output_fmt="NLC"
            )["image_intermediates"][0]  # (B, places, width), without the class token, before the last norm
        projected: Tensor = self.projector(seen)
        return projected

    def embed(self, tokens: Tensor, images: Tensor, shown: Tensor) -> Tensor:
        """Embeddings (B, L, D) of tokens (B, L) with pictures where these are IMAGE.

        images: (k, 3, H, W) in [0, 1], each text's own in their order. shown: (B,) bool, which texts have one. A text that is cut
        within its picture has the beginning of it.
        """
        places = tokens == IMAGE
        embedded = self.language.embed(tokens.masked_fill(places, 0))
        if not len(images):  # nothing of the projector, so that it has a gradient, zero, on every process
            none = images.new_zeros(0, self.tower_width)
            return embedded + self.projector(none).sum().to(embedded.dtype)
        seen = self.see(images).to(embedded.dtype)
        order = places.cumsum(1) - 1  # the how manieth place of its picture
        picture = (shown.cumsum(0) - 1).clamp_min(0)[:, None].expand_as(order)
        return torch.where(places[..., None], seen[picture, order.clamp(0, self.places - 1)], embedded)

    def forward(self, images: Tensor, tokens: Tensor, shown: Tensor) -> Tensor:
        """Logits (B, L, V) of each place's next token."""
        logits: Tensor = self.language(self.embed(tokens, images, shown))
        return logits

    def begin_from(self, tower: nn.Module, language: nn.Module | None = None) -> None:
        """Take the weights of a CLIP, and of a language model without adapters. Raises RuntimeError for those of other networks."""
        self.tower.load_state_dict(tower.state_dict())
        if language is not None:
            own = {
                key.replace(".base_layer.", "."): key
                for key in self.language.state_dict()
                if "lora_" not in key
            }
            state = language.state_dict()
            if other := sorted(own.keys() ^ state.keys()):
                raise RuntimeError(f"the language models differ in {len(other)} names, such as {other[0]}")
            self.language.load_state_dict({own[key]: value for key, value in state.items()}, strict=False)

    def adapters(self) -> list[nn.Parameter]:
        """LoRA's matrices."""
        return [p for name, p in self.language.named_parameters() if "lora_" in name]

    def adapt(self, on: bool) -> None:
        """Train and use the adapters, or neither."""
        for layer in self.language.modules():
            if isinstance(layer, peft().tuners.tuners_utils.BaseTunerLayer):
                layer.enable_adapters(on)

    def recompute(self) -> None:
        """Keep what goes into each of the language model's layers alone, and compute the layer again in the backward pass: less memory."""
        self.language.model.activation_checkpointing_enable({"use_reentrant": False})

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Projector and adapters: what is frozen has its own place."""
        whole = super().state_dict(*args, **kwargs)
        return {key: value for key, value in whole.items() if _is_trained(key)}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Inverse of state_dict. Raises RuntimeError for other keys."""
        expected = self.state_dict().keys()
        if other := sorted(expected ^ state_dict.keys()):
            raise RuntimeError(f"LLaVA's trained weights differ in {len(other)} names, such as {other[0]}")
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def example_inputs(self) -> tuple[Tensor, ...]:
        """A picture and a text of typical length, for counting what they cost."""
        text = torch.zeros(1, self.places + TYPICAL_TOKENS, dtype=torch.int64)
        text[:, : self.places] = IMAGE
        shape = (1, 3, self.image_size, self.image_size)
        return torch.zeros(shape), text, torch.ones(1, dtype=torch.bool)


def _is_trained(key: str) -> bool:
    return key.startswith("projector.") or "lora_" in key


class KeyedDropout(nn.Module):
    """Dropout whose draws follow from a key a text, not from torch's generator, and from a place in it, not from its padding.

    So a step is the same after a restart and on any number of processes. Without keys nothing is dropped.
    """

    keys: Tensor | None = None

    def __init__(self, drop: float, number: int) -> None:
        """drop: the probability. number: of the module in its network."""
        super().__init__()
        self.drop, self.number = drop, number

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> the same shape, entries zeroed and the others scaled up."""
        if not self.training or self.drop == 0.0 or self.keys is None:
            return x
        kept = uniform(self.keys + self.number, x[0].numel()).view_as(x) >= self.drop
        return x * kept.to(x.dtype) / (1.0 - self.drop)


def set_text_keys(model: nn.Module, keys: Tensor) -> None:
    """What the next batch's dropout follows from, also where it is computed a second time in the backward pass. keys: (B,) from gkl.rng."""
    for module in model.modules():
        if isinstance(module, KeyedDropout):
            module.keys = keys


def llava(
    tower: Clip, language: Language, rank: int, alpha: int, dropout: float, num_classes: int = 0
) -> Llava:
    """A LLaVA whose projector and adapters are fresh; the adapters, on every linear layer but the head, add nothing yet.

    rank, alpha, dropout: LoRA's. num_classes: of nothing.
    """
    library = peft()
    config = library.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, bias="none", task_type="CAUSAL_LM",
        target_modules=sorted({n.rpartition(".")[2] for n, m in language.model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}),
    )  # fmt: skip
    tower.requires_grad_(False)
    language.requires_grad_(False)
    library.inject_adapter_in_model(config, language.model)
    layers = [m for m in language.modules() if isinstance(m, library.tuners.lora.LoraLayer)]
    for number, layer in enumerate(layers):
        layer.lora_dropout["default"] = KeyedDropout(dropout, number)
    network = Llava(tower, language)
    for parameter in network.adapters():  # in full precision beside weights that may have half
        parameter.data = parameter.data.float()
    return network

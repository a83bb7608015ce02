"""A step of either of LLaVA's phases, at the paper's scale, on made-up texts and pictures, which benchmarks/gpu.py times.

    task = on_noise("gkl", device, "batch_size=8", "accumulate=2", "data.length=452")
    task.start_epoch(2)                     # the second phase; the first is epoch 1
    task.train_step(2, 0)

Nothing is read: networks are drawn on the device, the language model in the precision that it is kept in.
"""

import torch
from segmentation import Untrained

from gkl.data.conversations import IGNORED, IMAGE, Conversation, plain
from gkl.data.dialogues import DialogueBatch, DialogueData, Phase
from gkl.models.language import word_tokenizer
from trainers.loop.training import Training
from trainers.runs.compose import compose
from trainers.runs.settings import build
from trainers.runs.targets import instantiate


def on_noise(row: str, device: torch.device, *own: str) -> Training:
    """A training whose texts have data.length tokens: a picture, and words whose later half is the answer. Every step takes the same."""
    config = compose("train", [f"experiment=llava/{row}", "model.language.folder=null", *own])
    texts, length, side = config["batch_size"], config["data"]["length"], config["data"]["image_size"]
    torch.manual_seed(0)
    with device:
        model = instantiate(config["model"], num_classes=0)
    said = [Conversation("noise", ("", "said"), None, 1)] * texts  # of which nothing is read
    phases = (Phase(said, plain, None, 1),) * 2
    data = DialogueData(
        "noise", phases, word_tokenizer(()), None, {}, None, side, model.places, length, 1, "pillow"
    )
    task = build(config, device=device, data=data, model=model, tower=Untrained(lambda num_classes: model.tower))  # fmt: skip
    images = torch.randint(0, 256, (texts, 3, side, side), dtype=torch.uint8)
    tokens = torch.randint(model.language.vocab_size, (texts, length))
    tokens[:, : model.places] = IMAGE
    labels = tokens.clone()
    labels[:, : (model.places + length) // 2] = IGNORED
    every, card = torch.ones(texts, dtype=torch.bool), torch.zeros(texts, dtype=torch.int64)
    found = (images, tokens, labels, every[:, None].expand_as(tokens), every, card)
    batch = DialogueBatch(*(x.to(device) for x in found), sample=torch.arange(texts))
    task.batch, task.group_size = lambda epoch, step: batch, 1  # type: ignore[method-assign]
    return task

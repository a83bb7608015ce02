"""FitNet (Romero et al. 2015): the student's map in the middle, regressed onto the teacher's."""

import torch.nn.functional as F
from torch import Tensor, nn

from gkl.distillation.base import Context, Distiller, Terms, teacher_taps
from gkl.models.classifier import Taps


class FitNet(Distiller):
    """weight * mean squared error between a regressor of the student's map and the teacher's. Source: mdistiller's FitNet."""

    warmup = 0

    def __init__(
        self, context: Context, *, layer: int = 2, weight: float = 100.0, label_weight: float = 1.0
    ) -> None:
        """layer: which of the taps' `after`; 0 is the stem."""
        super().__init__(context, label_weight=label_weight)
        teacher = teacher_taps(context.teacher)
        self.layer, self.weight = layer, weight
        self.regressor = regressor(context.student.features[layer], teacher.features[layer])

    def forward(
        self, student: Taps, teacher: Taps | None, labels: Tensor, *, epoch: int, index: Tensor
    ) -> Terms:
        """The loss terms of this process's part of a batch."""
        target = teacher_taps(teacher).features[self.layer]
        distance = F.mse_loss(self.regressor(student.features[self.layer]), target, reduction="none")
        return {
            "distillation": self.weight * distance.flatten(1).mean(1),
        }


def regressor(student: Tensor, teacher: Tensor) -> nn.Sequential:
    """Convolution, batch norm, ReLU from a map (B, c, h, w) of the student's shape to the teacher's (B, C, H, W)."""
    (channels, height, width), (wanted, target_height, target_width) = student.shape[1:], teacher.shape[1:]
    convolution: nn.Module
    if height == 2 * target_height:
        convolution = nn.Conv2d(channels, wanted, 3, stride=2, padding=1)
    elif 2 * height == target_height:
        convolution = nn.ConvTranspose2d(channels, wanted, 4, stride=2, padding=1)
    elif height >= target_height:
        convolution = nn.Conv2d(channels, wanted, (1 + height - target_height, 1 + width - target_width))
    else:
        raise ValueError(
            f"FitNet cannot take the student's {height} x {width} map to the teacher's {target_height} x {target_width}; "
            "choose another distiller.layer"
        )
    return nn.Sequential(convolution, nn.BatchNorm2d(wanted), nn.ReLU())

"""The sample list: every operator test runs on these shapes."""

from dataclasses import dataclass

import torch

BOUNDARIES = ("circular", "reflect", "replicate", "zero", "valid")


@dataclass(frozen=True)
class Sample:
    image: tuple[int, int, int, int]
    kernel: tuple[int, int, int, int]

    def __str__(self):
        return "x".join(map(str, self.image)) + "-k" + "x".join(map(str, self.kernel))

    def tensors(self, boundary, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)

        image, kernel = random(*self.image), random(*self.kernel)
        kernel = kernel / kernel.sum((-2, -1), keepdim=True)
        height, width = self.image[2:]
        if boundary == "valid":
            height, width = height - self.kernel[2] + 1, width - self.kernel[3] + 1
        observation = random(*self.image[:2], height, width)
        mask = (random(1, 1, height, width) > 0.3).to(dtype)
        return image, kernel, observation, mask


SMALL = [
    Sample((2, 3, 8, 9), (1, 1, 3, 3)),
    Sample((2, 3, 8, 9), (2, 1, 4, 5)),
    Sample((2, 2, 9, 7), (2, 2, 3, 2)),
    Sample((2, 3, 7, 8), (1, 3, 7, 8)),  # kernel as large as the image
    Sample((1, 1, 1, 1), (1, 1, 1, 1)),
    Sample((1, 2, 1, 9), (1, 1, 1, 4)),
]
SPECTRAL = [
    Sample((2, 3, 24, 20), (1, 1, 11, 12)),  # transform size, wraps in place
    Sample((2, 3, 23, 22), (2, 1, 10, 11)),  # 23 is prime: extended
    Sample((2, 2, 32, 30), (2, 2, 13, 9)),
    Sample((1, 1, 16, 16), (1, 1, 16, 16)),
    Sample((3, 1, 40, 11), (1, 1, 33, 11)),
]
EMPTY = [Sample((0, 3, 8, 9), (1, 1, 3, 3)), Sample((0, 3, 8, 9), (0, 1, 3, 3))]
SAMPLES = SMALL + SPECTRAL

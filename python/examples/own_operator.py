"""A forward model of one's own: a scanner's carriage that moved too fast, by an unknown amount.

Every row is smeared over the same unknown number of pixels.  EM finds the number and the picture;
adjoint and proximal step follow from ``simulate`` by themselves.

    python python/examples/own_operator.py
"""

import torch
from skimage import data

import latentdem
import latentdem_ext as ext
from latentdem.operators.edges import l0_deconvolution


class RowSmear(latentdem.ForwardModel):
    """``y = box_n * x`` along rows; phi is the length n in pixels, ``[1]``."""

    lengths = torch.arange(1, 32, 2)

    def simulate(self, image, parameters):  # noqa: D102
        length = int(parameters)
        kernel = image.new_full((1, 1, 1, length), 1 / length)
        return ext.blur_conv2d(image, kernel, boundary="reflect")

    def start_parameters(self):  # noqa: D102
        # An edge becomes a ramp between two corners: slopes repeat themselves n pixels on, negated.
        slope = self.observation.mean((0, 1)).diff(dim=-1)
        power = torch.fft.rfft(slope, n=2 * slope.shape[-1]).abs().square()
        return torch.fft.irfft(power).mean(0)[:32].argmin()[None] | 1

    def update(self, image, parameters, settings):  # noqa: D102
        # Salient edges only: the image's fine detail was made with the last length and would
        # confirm it. Their contrast is too low, so the best match is one of direction.
        edges = l0_deconvolution(image.mean(1, keepdim=True), None, weight=0.015)
        wanted = self.observation.mean(1, keepdim=True).diff(dim=-1).flatten()
        smeared = [self.simulate(edges, n[None]).diff(dim=-1).flatten() for n in self.lengths]
        match = [torch.cosine_similarity(s, wanted, 0) for s in smeared]
        return self.lengths[int(torch.stack(match).argmax())][None]


def main(side: int = 192, length: int = 15, steps: int = 6) -> tuple[int, float, float]:
    """Smear a photograph, restore it; the length found, and both mean squared errors."""
    picture = torch.from_numpy(data.astronaut()[:side, 128 : 128 + side].copy())
    sharp = picture.permute(2, 0, 1)[None] / 255
    smeared = RowSmear(sharp, noise_std=0.01).simulate(sharp, torch.tensor([length]))
    torch.manual_seed(0)
    observed = smeared + 0.01 * torch.randn_like(smeared)
    state = latentdem.invert(
        RowSmear(observed, noise_std=0.01),
        settings=latentdem.ProxSettings(steps=steps, chains=1),
        progress=lambda report: print(f"step {report.step + 1}: {int(report.kernel)} pixels"),
    )
    before, after = (float((x - sharp).square().mean()) for x in (observed, state.image))
    return int(state.kernel), before, after


if __name__ == "__main__":
    found, before, after = main()
    print(f"smeared by 15 pixels, found {found}; squared error {before:.4f} -> {after:.4f}")

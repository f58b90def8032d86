"""Settings of the 3D task: pose search, fused sampler, and their alternation with the field."""

from __future__ import annotations

from dataclasses import dataclass, field

from latentdem.em.settings import _check

STARTS = ("grid", "random")


@dataclass(frozen=True)
class PoseSettings:
    """Poses from the denoising loss (:mod:`latentdem.em.poses`)."""

    azimuth_step: float = 15.0
    """Spacing of the azimuth grid in degrees; divides 360."""
    elevation_offsets: tuple[float, ...] = (-16.0, 16.0)
    """Other elevations in the grid for each view, against the embedder's, in degrees."""
    grid_levels: tuple[float, ...] = (0.8, 0.5)
    """Noise levels t / T of the denoising loss in the grid, the noisiest first."""
    grid_kept: float = 0.25
    """Share of a pair's grid points, the best by the levels before, that the next level sees."""
    levels: tuple[float, ...] = (0.35, 0.5, 0.65, 0.8, 0.9)
    """Those of the refinement."""
    noises: int = 1
    """Noise draws a level, the same for all poses."""
    modes: int = 4
    """Best grid points, well separated, that are refined."""
    separation: float = 30.0
    """Least distance in azimuth between two of them, degrees."""
    iterations: int = 3
    """Gauss-Newton steps of the refinement."""
    give_up: float = 6.0
    """Nats (over the temperature) behind the best at which a mode is no longer refined."""
    temperature: float = 6.0
    """What the log-likelihood is divided by: the loss's 2,000 residuals are not independent, and
    the network is not exact.  Scales the reported uncertainties."""
    elevation_std: float = 15.0
    """Error of the embedder's elevations, degrees: a Gaussian prior of the search."""
    radius_std: float = 0.2
    """The same of its radii, world units."""

    def __post_init__(self) -> None:
        _check(
            self.azimuth_step > 0 and abs(360 / self.azimuth_step % 1) < 1e-9,
            "azimuth_step must divide 360",
            self.azimuth_step,
        )
        for name in ("levels", "grid_levels"):
            levels = getattr(self, name)
            good = len(levels) > 0 and all(0 < level < 1 for level in levels)
            _check(good, f"{name} must lie between 0 and 1", levels)
        for name in ("noises", "modes", "temperature", "elevation_std", "radius_std",
                     "give_up"):  # fmt: skip
            value = getattr(self, name)
            _check(value > 0, f"{name} must be positive", value)
        _check(0 < self.grid_kept <= 1, "grid_kept must lie between 0 and 1", self.grid_kept)
        _check(self.iterations >= 0, "iterations must be >= 0", self.iterations)


@dataclass(frozen=True)
class SamplerSettings:
    """Fused sampling of novel views (:mod:`latentdem.em.novel_views`)."""

    targets: int = 12
    """Novel poses on the ring around the object."""
    spread: float = 12.0
    """The ring's poses alternate this many degrees above and below the inputs' elevation."""
    steps: int = 2
    """DDIM steps from pure noise.  A prior that knows little samples detail at random: on held-out
    objects two steps, near the posterior mean, are 1.3 dB closer to unseen views than four."""
    restart: float = 0.6
    """Noise level t / T that later rounds start from, at the field's renders."""
    guidance: float = 1.0
    """Factor of the given views' pull against the unconditional prediction; 1: as they are."""
    angle_std: float = 1.5
    """Growth of a view's own error with its angular distance from the target, in units of the
    noise, at 90 degrees; 0: all distances count alike."""
    pose_std: float = 1.0
    """nu of the published weights for a pose uncertain by 30 degrees, in units of the noise."""
    every: int = 4
    """Skip-gradient: the M-step runs at every K-th step ..."""
    last: int = 1
    """... and at each of the last ones."""
    agreement: float = 0.2
    """lambda: weight of a view's agreement with the fused prediction in the M-step."""
    anchor: float = 0.1
    """delta: weight of its agreement with the first view's."""

    def __post_init__(self) -> None:
        for name in ("targets", "steps", "every"):
            _check(getattr(self, name) > 0, f"{name} must be positive", getattr(self, name))
        _check(0 < self.restart < 1, "restart must lie between 0 and 1", self.restart)
        for name in ("angle_std", "pose_std", "agreement", "anchor", "last", "spread"):
            _check(getattr(self, name) >= 0, f"{name} must be >= 0", getattr(self, name))


@dataclass(frozen=True)
class ReconstructSettings:
    """How :func:`latentdem.reconstruct` alternates poses, sampler and field."""

    start: str = "grid"
    """Where the poses start: ``grid``, or ``random`` (one random azimuth a view)."""
    m_step: bool = True
    """Move the poses within the sampler's trajectory."""
    rendering: bool = True
    """Refine the poses of the input views through the renderer."""
    rendering_slack: float = 1.0
    """They may become less likely by so many nats (over the temperature) under the prior."""
    rounds: int = 2
    """Alternations of sampler and field, at most."""
    tolerance: float = 1.0
    """They end when no pose turns by more than this many degrees."""
    novel_weight: float = 0.3
    """Weight of a sampled view in the field's loss; an input view has one."""
    resolution: int = 48
    """Voxels a side of the field."""
    iterations: int = 200
    """Steps of a fit of the field."""
    samples_per_ray: int = 64
    """Of the renderer."""
    contradiction: float = 2.0
    """A view is reported when its residual is this many times the others' median ..."""
    residual_floor: float = 0.08
    """... and above this RMSE."""
    least_evidence: float = 0.0
    """A view is reported, too, when no other explains it by so many nats (over the temperature)
    more than the prior does alone."""
    poses: PoseSettings = field(default_factory=PoseSettings)
    sampler: SamplerSettings = field(default_factory=SamplerSettings)

    def __post_init__(self) -> None:
        _check(self.start in STARTS, f"start must be one of {', '.join(STARTS)}", self.start)
        for name in ("rounds", "resolution", "iterations", "samples_per_ray", "contradiction"):
            _check(getattr(self, name) > 0, f"{name} must be positive", getattr(self, name))
        for name in ("tolerance", "novel_weight", "residual_floor", "rendering_slack"):
            _check(getattr(self, name) >= 0, f"{name} must be >= 0", getattr(self, name))

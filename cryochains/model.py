"""The whole autoencoder: encoder → dynamics → imaging. Only the encoder has parameters (section 2)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .dynamics import Dynamics
from .encoder import Encoder
from .imaging import Imaging, check_fits_in_box, filter_images, gaussian_transfer
from .modes import Modes, compute_modes
from .structure import Structure

# Å. Where atoms are not at their reference places, sharp images would look dimmer than they are.
CONTRAST_BLUR = 8.0


class CryoChains(nn.Module):
    """Everything fixed about an experiment (molecule, modes, microscope) and the encoder that learns.

    Parameters
    ----------
    structure : Structure
        The reference conformation X⁽⁰⁾.
    box_size, pixel_size
        Of the images, px and Å; ``CryoChains.for_particles`` reads them from a stack.
    modes : Modes or int or sequence of int or None
        Normal modes, or how many to compute (for all chains alike or one number a chain); None for rigid chains.
    rotation, translation : bool
        Whether chains turn and shift. With `modes` these are the paper's ablations: cN50 is
        ``rotation=False, translation=False``; cR is ``modes=None, translation=False``; cRT is ``modes=None``;
        N100 is ``CryoChains(structure.as_one_body(), modes=100, rotation=False, translation=False, …)``.
    sigma : float, optional
        Width of an atom's Gaussian in Å (see `Imaging`).
    width, pool
        Of the encoder (see `Encoder`).
    seed : int
        Of the encoder's initial weights.

    Attributes
    ----------
    contrast : float
        Brightness of the images over that of the model; measured from the particles by `estimate_contrast`.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> model = CryoChains(load_structure("glua3-closed"), box_size=32, pixel_size=5.0, modes=4, width=0.1)
    >>> images = torch.randn(3, 32, 32)
    >>> reconstruction = model(images, torch.eye(3).expand(3, 3, 3))
    >>> reconstruction.shape
    torch.Size([3, 32, 32])
    """

    def __init__(
        self,
        structure: Structure,
        *,
        box_size: int,
        pixel_size: float,
        modes: Modes | int | Sequence[int] | None = 50,
        rotation: bool = True,
        translation: bool = True,
        sigma: float | None = None,
        width: float = 1.0,
        pool: str = "block",
        seed: int = 0,
    ):
        super().__init__()
        if modes is not None and not isinstance(modes, Modes):
            modes = None if modes == 0 else compute_modes(structure, n_modes=modes)
        self.dynamics = Dynamics(structure, modes, rotation, translation)
        self.imaging = Imaging(structure.weights, box_size, pixel_size, structure.origin, sigma)
        check_fits_in_box(structure.coords, structure.origin, box_size, pixel_size)
        # The caller's random state is none of our business.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = Encoder(self.dynamics, box_size, width, pool)
        self.register_buffer("contrast", torch.tensor(1.0))

    @classmethod
    def for_particles(cls, structure: Structure, particles, **settings) -> "CryoChains":
        """A model with the box and pixel size of `particles`."""
        return cls(structure, box_size=particles.box_size, pixel_size=particles.pixel_size, **settings)

    @property
    def structure(self) -> Structure:
        return self.dynamics.structure

    @property
    def device(self) -> torch.device:
        return self.contrast.device

    def encode(self, images: Tensor) -> Tensor:
        """(b, p) latents of (b, box, box) images."""
        return self.encoder(images)

    def decode(self, latents: Tensor) -> Tensor:
        """(b, n_atoms, 3) coordinates in Å of (b, p) latents."""
        return self.dynamics.decode(latents)

    def render(
        self, latents: Tensor, rotations: Tensor, shifts: Tensor | None = None, ctf: Tensor | None = None
    ) -> Tensor:
        """(b, box, box) noise-free images of (b, p) latents, as bright as the particles."""
        return self.contrast * self.imaging(self.decode(latents), rotations, shifts, ctf)

    def forward(
        self, images: Tensor, rotations: Tensor, shifts: Tensor | None = None, ctf: Tensor | None = None
    ) -> Tensor:
        """(b, box, box) reconstruction of (b, box, box) images seen at the given poses."""
        return self.render(self.encode(images), rotations, shifts, ctf)

    def check_particles(self, particles) -> None:
        """Raise ValueError when `particles` are none, or of another box or pixel size than this model's."""
        if not len(particles):
            raise ValueError("expected at least one particle, got none; try another selection or split")
        box, pixel = self.imaging.box_size, self.imaging.pixel_size
        if particles.box_size != box or abs(particles.pixel_size - pixel) > 1e-3:
            raise ValueError(
                f"expected particles of {box} px × {pixel:g} Å, got {particles.box_size} px × "
                f"{particles.pixel_size:g} Å; try CryoChains.for_particles"
            )

    @torch.no_grad()
    def estimate_contrast(self, particles, n: int = 500) -> float:
        """Measure how bright the images are over the reference's projections, by regression on up to `n` of them.

        Raises
        ------
        ValueError
            When the regression is negative: the images are protein-dark.
        """
        step = -(-len(particles) // n)
        low_pass = gaussian_transfer(self.imaging.box_size, self.imaging.pixel_size, CONTRAST_BLUR, self.device)
        along = power = 0.0
        for batch in particles[::step].batches(64, device=self.device):
            coords = self.dynamics.reference.expand(len(batch.rows), -1, -1)
            model = self.imaging(coords, *batch.pose, blur=CONTRAST_BLUR)
            model = model - model.mean(dim=(-2, -1), keepdim=True)
            along += float((filter_images(batch.images, low_pass) * model).sum())
            power += float((model * model).sum())
        check_contrast(along)
        self.contrast.fill_(along / power)
        return float(self.contrast)


def check_contrast(contrast: float) -> None:
    """Raise ValueError when images are the negative of the model."""
    if contrast <= 0:
        raise ValueError(
            "expected protein-bright images, got images that look like the negative of the reference; "
            "try load_particles(…, invert=True), and check that the poses belong to this structure"
        )

"""Every particle's latents by maximum a posteriori, under a population learned by EM (the refinement).

Symbols: z → `latents`, μ, Σ → `Population.mean`, `covariance`, σ → `noise_std`. For every particle

    ½ ‖y − f(z)‖²/σ² + ½ (z − μ)ᵀ Σ⁻¹ (z − μ)

is minimised by Levenberg–Marquardt with the analytic Jacobian, coarse to fine. After each pass over the images, EM
re-estimates μ, Σ and σ from all particles on the stored normal equations, which needs no image:

    C_i = (H_i/σ² + Σ⁻¹)⁻¹,  μ = mean z_i,  Σ = mean[(z_i − μ)(z_i − μ)ᵀ + C_i]   (e.g. Bishop, PRML, section 9.4)

Σ is shrunk towards the elastic network's own prior (variance of α_k ∝ 1/λ_k), which decides when particles are few.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .files import fingerprint, load_tensors, save_tensors
from .likelihood import independent_pixels, map_blocks, normal_equations, place_variance
from .model import CryoChains, check_contrast
from .particles import ParticleStack
from .population import Population, Refinement, elastic_variance, reach, shrink_covariance
from .stacks import positions

# Å. Each pass sees a little more detail; the last ones see the images as they are.
BLURS = (8.0, 6.0, 4.0, 2.0, 0.0, 0.0)
# Passes at the last blur go on, up to so many, while particles still move by more than this (RMS Å).
MAX_EXTRA_PASSES, STILL = 4, 0.1
# EM on the stored normal equations: few steps while they will be made anew, more at the end; stop at a change in Å.
EM_STEPS, LAST_EM_STEPS, EM_TOLERANCE = 10, 20, 3e-3
# Of the signal: the model's images are not thought right to better than this, or clear images would be overfitted.
MODEL_ERROR = 0.3
# The brightness is measured where a misplaced atom does not lower it.
CONTRAST_BLUR = 4.0


def refine(
    model: CryoChains,
    particles: ParticleStack,
    population: Population | None = None,
    *,
    start: Tensor | None = None,
    blurs: tuple[float, ...] = BLURS,
    n_population: int = 4000,
    batch_size: int = 64,
    seed: int = 0,
    checkpoint=None,
    progress: bool = True,
) -> Refinement:
    """Find the latents of every particle, with error bars.

    Parameters
    ----------
    model : CryoChains
        Its encoder is not used; its contrast is set to the population's.
    particles : ParticleStack
    population : Population, optional
        Known from earlier, as when scoring held-out particles; None learns it from these.
    start : (N, p) tensor, optional
        Where to start, such as the encoder's answer; default the population's mean or the reference.
    blurs : tuple of float
        Å, one a pass over the images. The longest should be about the largest motion expected.
    n_population : int
        The population is learned from at most this many particles, which keeps memory from growing.
    checkpoint : path, optional
        Written after every pass; a run that was cut resumes from it and gives the same numbers.

    Returns
    -------
    Refinement

    Raises
    ------
    ValueError
        When the particles do not fit the model, the population or checkpoint is of another molecule, or an image
        holds NaN.

    Examples
    --------
    >>> from cryochains import load_structure, simulate_particles
    >>> closed = load_structure("glua3-closed")
    >>> particles = simulate_particles(closed, 8, conformations=closed.coords[None], box_size=32, progress=False)
    >>> model = CryoChains.for_particles(closed, particles, modes=None, width=0.1)
    >>> refine(model, particles, blurs=(4.0, 0.0), progress=False).latents.shape
    torch.Size([8, 12])
    """
    _check(model, particles, population, start, blurs)
    n, p = len(particles), model.dynamics.n_latents
    chosen = np.zeros(n, dtype=bool)
    if population is None:
        chosen[np.random.default_rng(seed).permutation(n)[:n_population]] = True
    # Those the population is learned from come first; the rest stream through in blocks of the same size.
    rest = np.flatnonzero(~chosen)
    blocks = [np.flatnonzero(chosen)] if chosen.any() else []
    blocks += np.array_split(rest, -(-len(rest) // n_population)) if len(rest) else []
    latents, std, history = torch.zeros(n, p), torch.zeros(n, p), []
    for number, rows in enumerate(blocks):
        path = checkpoint if checkpoint is None or number == 0 else f"{checkpoint}.block{number}"
        part = None if start is None else start[rows]
        passes = _Passes(model, particles[rows], part, population, blurs, batch_size, path)
        learned, steps = passes.run(progress)
        population = population or learned
        latents[rows], std[rows] = passes.proposal.cpu(), passes.std.cpu()
        history = history or steps
        # Its normal equations are the bulk of the memory: gone before the next block makes its own.
        del passes
    model.contrast.fill_(population.contrast)
    return Refinement(latents, std, particles.ids, population, history)


@torch.no_grad()
def posterior_covariance(model: CryoChains, particles: ParticleStack, refinement: Refinement, rows) -> Tensor:
    """(len(rows), p, p) posterior covariance of some particles, in latent units (about Å²).

    Computed on demand from their images' geometry: storing it for all particles would take N·p² numbers.
    """
    population = refinement.population
    model.contrast.fill_(population.contrast)
    rows = torch.from_numpy(positions(rows, len(particles)))
    z = refinement.latents[rows].to(model.device)
    covariances, prior = [], population.covariance.to(model.device).inverse()
    for batch in particles[rows].batches(64, device=model.device):
        variance = None
        # Atoms are as wide as they are uncertain: found sharp first, then as the refinement saw them.
        for _ in range(2):
            equations = normal_equations(model, None, batch.pose, z[batch.rows], variance=variance)
            exact = (equations.hessian.double() / population.noise_std**2 + prior).inverse()
            variance = place_variance(model.dynamics, z[batch.rows], batch.pose[0], exact)
        covariances.append(exact)
    return torch.cat(covariances)


class _Passes:
    """Passes over the images of some particles, all of whose normal equations are held in memory."""

    def __init__(self, model, particles, start, population, blurs, batch_size, checkpoint):
        self.model, self.particles, self.blurs = model, particles, blurs
        self.batch_size, self.checkpoint = batch_size, checkpoint
        self.identity = ""
        if checkpoint is not None:
            given = () if population is None else (population.mean, population.covariance, population.noise_std)
            imaging, structure = model.imaging, model.structure
            self.identity = fingerprint(
                particles.fingerprint(), structure.content_hash, model.dynamics.scale, imaging.origin,
                imaging.weights, imaging.sigma, blurs, -1 if start is None else start, *given,
            )  # fmt: skip
        n, p, device = len(particles), model.dynamics.n_latents, model.device
        self.reach = reach(model.dynamics).to(device)
        self.fixed = population is not None
        if self.fixed:
            self.mean = population.mean.to(device).double()
            self.covariance = population.covariance.to(device).double()
            self.noise_std = population.noise_std
            model.contrast.fill_(population.contrast)
        else:
            self.covariance = elastic_variance(model.dynamics).to(device).diag()
            self.mean = self.covariance.new_zeros(p)
            self.noise_std = None
            model.estimate_contrast(particles)
        self.proposal = self.mean.float().expand(n, p).clone() if start is None else start.to(device).float().clone()
        self.latents = self.proposal.clone()
        self.std = torch.zeros(n, p, device=device)
        self.residual = torch.full((n,), torch.inf, device=device)
        self.damping = torch.zeros(n, device=device)
        self.hessian = torch.zeros(n, p, p, device=device)
        self.right = torch.zeros(n, p, device=device)
        self.variance = torch.zeros(n, model.structure.n_atoms, device=device)
        self._widen()
        # Share of the atoms in each latent's chain: turns a step in z into RMS Å over the molecule.
        share = np.bincount(model.structure.chain_index) / model.structure.n_atoms
        self.share = torch.from_numpy(share[model.dynamics.latent_chain]).float().to(device)

    def run(self, progress) -> tuple[Population, list]:
        history, n, blurs = self._resume(), len(self.particles), self.blurs
        with tqdm(total=len(blurs) * n, initial=len(history) * n, desc="refining", unit="particle",
                  disable=not progress) as bar:  # fmt: skip
            while not self._done(history):
                number = len(history)
                blur = blurs[min(number, len(blurs) - 1)]
                same_blur = number > 0 and blur == history[-1]["blur"]
                history.append(self._pass(blur, same_blur, number >= len(blurs) - 1, bar))
                bar.set_postfix(blur=f"{blur:g} Å", step=f"{history[-1]['step']:.2f} Å")
                self._save(history)
        shared = self.noise_std, float(self.model.contrast), self.model.structure.content_hash
        return Population(self.mean.cpu(), self.covariance.cpu(), *shared), history

    def _done(self, history: list) -> bool:
        extra = len(history) - len(self.blurs)
        return extra >= 0 and (history[-1]["step"] < STILL or extra >= MAX_EXTRA_PASSES)

    def _pass(self, blur: float, same_blur: bool, late: bool, bar) -> dict:
        """One look at every image: linearise, refuse steps that made things worse, EM, next step."""
        model, pixels = self.model, independent_pixels(self.model, blur)
        overlap = power = refused = 0
        residuals, moved = torch.zeros_like(self.residual), torch.zeros_like(self.latents)
        precision = self.covariance.inverse()
        for batch in self.particles.batches(self.batch_size, device=model.device):
            rows = torch.as_tensor(batch.rows, device=model.device)
            z = self.proposal[rows]
            eq = normal_equations(model, batch.images, batch.pose, z, blur, self.variance[rows])
            if self.noise_std is None:
                self.noise_std = float((eq.residual.mean() / pixels).sqrt())
            objective = self._objective(eq.residual, z, precision)
            before = self._objective(self.residual[rows], self.latents[rows], precision)
            # A tenth of a nat is beyond the precision of a sum over all pixels.
            worse = (objective > before + 0.1) & same_blur
            hessian, gradient, rss = eq.hessian, eq.gradient, eq.residual
            if worse.any():
                # Rare: go back and look again from the last good place, with a shorter step this time.
                back = [None if part is None else part[worse] for part in batch.pose]
                z = torch.where(worse.unsqueeze(1), self.latents[rows], z)
                variance = self.variance[rows[worse]]
                again = normal_equations(model, batch.images[worse], tuple(back), z[worse], blur, variance)
                hessian[worse], gradient[worse], rss[worse] = again.hessian, again.gradient, again.residual
                refused += int(worse.sum())
            self.damping[rows] = torch.where(worse, (8 * self.damping[rows]).clamp_min(1.0), self.damping[rows] / 8)
            moved[rows] = z - self.latents[rows]
            self.latents[rows], self.hessian[rows], residuals[rows] = z, hessian, rss
            self.right[rows] = gradient + (hessian @ z.unsqueeze(-1)).squeeze(-1)
            overlap += float(eq.overlap.double().sum())
            power += float(eq.power.double().sum())
            bar.update(len(rows))
        self.residual = residuals
        if not self.fixed and blur >= CONTRAST_BLUR:
            factor = overlap / power
            check_contrast(factor)
            model.contrast.mul_(factor)
            self.hessian *= factor**2
            self.right *= factor
        residual, signal = float(residuals.double().sum()), float(np.sqrt(power / (len(self.latents) * pixels)))
        for _ in range(1 if self.fixed else LAST_EM_STEPS if late else EM_STEPS):
            before = torch.cat([self.mean, self.covariance.diagonal().sqrt()])
            means = self._expectation(pixels, residual, signal)
            after = torch.cat([self.mean, self.covariance.diagonal().sqrt()])
            if (after - before).abs().max() < EM_TOLERANCE:
                break
        step = means - self.latents
        if same_blur:
            # A step that turns back on the last one is too long: the secant says by how much.
            back = (step * moved).sum(1) / moved.square().sum(1).clamp_min(1e-9)
            step /= (1 - back.clamp(max=0)).unsqueeze(1)
        # Gaussians overlap with where they were as long as they move by less than their width.
        length = (step.square() * self.share).sum(1).sqrt()
        step *= (float(np.hypot(model.imaging.sigma, blur)) / length.clamp_min(1e-9)).clamp(max=1.0).unsqueeze(1)
        self.proposal = self.latents + step
        self._widen()
        return {
            "blur": blur, "step": float((step.square() * self.share).sum(1).mean().sqrt()),
            "refused": refused, "noise_std": self.noise_std, "contrast": float(model.contrast),
            "spread": float(self.covariance.diagonal().sum().sqrt()),
        }  # fmt: skip

    def _widen(self) -> None:
        """How uncertain every atom's place is, from what is known of each particle so far: at first, the prior."""
        precision = self.covariance.inverse().float()

        def widen(rows: slice) -> None:
            known = torch.linalg.inv(self.hessian[rows] / (self.noise_std or 1.0) ** 2 + precision)
            rotations = self.particles.rotations[rows].to(precision)
            self.variance[rows] = place_variance(self.model.dynamics, self.proposal[rows], rotations, known)

        n = len(self.proposal)
        map_blocks(widen, [slice(start, start + 64) for start in range(0, n, 64)], precision.device)

    def _objective(self, residual: Tensor, z: Tensor, precision: Tensor) -> Tensor:
        off = z.double() - self.mean
        return residual / (2 * self.noise_std**2) + ((off @ precision) * off).sum(1).float() / 2

    def _expectation(self, pixels: float, residual: float, signal: float) -> Tensor:
        """Posterior means and error bars on the stored normal equations; updates μ, Σ, σ unless they are given."""
        n, p = self.latents.shape
        precision = self.covariance.inverse()
        means = torch.empty_like(self.latents)

        def solve(rows: slice) -> tuple[Tensor, float]:
            hessian = self.hessian[rows].double() / self.noise_std**2
            covariance = torch.cholesky_inverse(torch.linalg.cholesky(hessian + precision))
            right = self.right[rows].double() / self.noise_std**2 + precision @ self.mean
            z, damped = (covariance @ right.unsqueeze(-1)).squeeze(-1), self.damping[rows].double()
            if damped.any():
                ridge = damped[:, None, None] * torch.eye(p).to(right)
                right = right + damped[:, None] * self.latents[rows].double()
                z = torch.linalg.solve(hessian + precision + ridge, right)
            means[rows] = z.float()
            self.std[rows] = covariance.diagonal(dim1=1, dim2=2).sqrt().float()
            return covariance.sum(0), float((covariance * hessian).sum())

        parts = map_blocks(solve, [slice(start, start + 64) for start in range(0, n, 64)], means.device)
        total, trace = sum(part[0] for part in parts), sum(part[1] for part in parts)
        if not self.fixed:
            self.mean = means.double().mean(0).clamp(-self.reach, self.reach)
            off = means.double() - self.mean
            self.covariance = shrink_covariance(off.T @ off + total, n, self.model.dynamics)
            narrower = (self.reach / self.covariance.diagonal().sqrt()).clamp(max=1.0)
            self.covariance = narrower[:, None] * self.covariance * narrower
            estimate = float(np.sqrt((residual + trace * self.noise_std**2) / (n * pixels)))
            self.noise_std = max(estimate, MODEL_ERROR * signal)
        return means

    def _state(self) -> dict:
        names = ("proposal", "latents", "std", "residual", "damping", "variance", "mean", "covariance")
        return {name: getattr(self, name) for name in names}

    def _save(self, history: list) -> None:
        if self.checkpoint is not None:
            meta = {"noise_std": self.noise_std, "contrast": float(self.model.contrast), "history": history,
                    "identity": self.identity}  # fmt: skip
            save_tensors(self.checkpoint, self._state(), {"kind": "refinement checkpoint", **meta})

    def _resume(self) -> list:
        """Take up a run that was cut, if its checkpoint exists; returns the passes already done."""
        if self.checkpoint is None or not Path(self.checkpoint).exists():
            return []
        tensors, meta = load_tensors(self.checkpoint, "refinement checkpoint")
        if meta["identity"] != self.identity:
            raise ValueError(
                f"expected a checkpoint of {self.model.structure!r}, these {len(self.latents)} particles and settings, "
                f"got another run's in {self.checkpoint}; try another checkpoint path"
            )
        for name, value in tensors.items():
            setattr(self, name, value.to(self.model.device))
        self.noise_std = meta["noise_std"]
        self.model.contrast.fill_(meta["contrast"])
        return meta["history"]


def _check(model: CryoChains, particles: ParticleStack, population: Population | None, start, blurs) -> None:
    n_latents = model.dynamics.n_latents
    model.check_particles(particles)
    if not blurs:
        raise ValueError("expected at least one blur in Å, got none; try blurs=(0.0,)")
    if population is not None and population.structure_hash != model.structure.content_hash:
        raise ValueError(
            f"expected a population of {model.structure!r}, got one of another molecule; try population=None"
        )
    if population is not None and len(population.mean) != n_latents:
        raise ValueError(
            f"expected a population of {n_latents} latents, got {len(population.mean)}; try the model it came from"
        )
    if start is not None and (tuple(start.shape) != (len(particles), n_latents) or not torch.isfinite(start).all()):
        raise ValueError(
            f"expected finite start latents of shape {(len(particles), n_latents)}, got {tuple(start.shape)}; "
            "try start=None"
        )

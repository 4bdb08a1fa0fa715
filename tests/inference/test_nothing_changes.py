"""No public verb changes what it is given: all that can be reached is bit for bit the same.

Also where the verb is interrupted. The table of verbs must be complete.
"""

import functools
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import prody
import pytest
import torch
from torch import nn

import cryochains
import cryochains.analysis
import cryochains.images
import cryochains.inference
import cryochains.model
import cryochains.molecule
import cryochains.view
from cryochains import analysis, images, inference, molecule
from cryochains import model as models
from cryochains.images import Map, ParticleStack
from cryochains.images.stacks import Images
from cryochains.inference import Encoder, Result
from cryochains.inference.encoder import new_network
from cryochains.model import Dynamics, Microscope, Model, Population, Truth
from cryochains.molecule import Beads, Modes, Structure
from cryochains.view import plots

N = 10
QUIET = {"progress": False}


# What can be reached


def snapshot(thing) -> dict[str, object]:
    """All numbers and texts that `thing` leads to, by their path; cached properties included."""
    content: dict[str, object] = {}
    _walk(thing, "", content, set())
    return content


def _walk(thing, path: str, content: dict, seen: set) -> None:
    if isinstance(thing, (torch.Tensor, np.ndarray)):
        content[path] = _of_array(thing)
        return
    if isinstance(thing, pd.DataFrame):
        content[path] = thing.to_csv()
        return
    parts = _parts(thing)
    if parts is None:
        content[path] = repr(thing)
    elif id(thing) not in seen:
        seen.add(id(thing))
        for name, part in parts.items():
            _walk(part, f"{path}.{name}", content, seen)


def _of_array(array) -> tuple:
    kind = (type(array), array.dtype, tuple(array.shape), getattr(array, "requires_grad", None))
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu().numpy()
    if array.dtype == object:
        return *kind, repr(array.tolist())
    return *kind, hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _parts(thing) -> dict | None:
    """What is inside of an object that holds others; None of a plain value."""
    if isinstance(thing, prody.AtomGroup):
        parts = {name: thing.getData(name) for name in thing.getDataLabels()}
        parts |= {f"flag {name}": thing.getFlags(name) for name in thing.getFlagLabels()}
        return parts | {"coords": thing.getCoordsets(), "title": thing.getTitle()}
    if isinstance(thing, nn.Module):
        return dict(thing.state_dict()) | {"training": thing.training}
    if isinstance(thing, dict):
        return thing
    if isinstance(thing, (tuple, list)):
        return dict(enumerate(thing))
    if is_dataclass(thing) and not isinstance(thing, type):
        for name, attribute in inspect.getmembers_static(type(thing)):
            if isinstance(attribute, functools.cached_property):
                getattr(thing, name)
        return vars(thing)
    return None


def assert_same(before: dict, after: dict):
    changed = [path for path in before if path not in after or before[path] != after[path]]
    assert not changed, changed
    assert not after.keys() - before.keys(), "nothing is added to it"


# What verbs are given


@dataclass(frozen=True, eq=False)
class Given:
    """One of everything that a public verb takes."""

    closed: Structure
    opened: Structure
    modes: Modes
    model: Model
    dynamics: Dynamics
    beads: Beads
    bead_dynamics: Dynamics
    microscope: Microscope
    particles: ParticleStack
    in_memory: ParticleStack
    truth: Truth
    result: Result
    framed: Result
    encoded: Result
    population: Population
    motions: analysis.PrincipalMotions
    encoder: Encoder
    residual_encoder: inference.ResidualEncoder
    map: Map
    comparison: analysis.MapComparison
    latents: torch.Tensor
    conformations: np.ndarray
    covariance: torch.Tensor
    saved: Path


@pytest.fixture(scope="module")
def given(pair, tmp_path_factory) -> Given:
    folder = tmp_path_factory.mktemp("given")
    closed, opened = pair
    conformations = molecule.morph(closed, opened, 5)
    particles = models.simulate_particles(
        closed,
        N,
        conformations=conformations,
        box_size=32,
        snr_db=3.0,
        shift_std=2.0,
        path=folder / "a.star",
        progress=False,
    )
    model = Model(closed, particles, modes=2)
    result = inference.refine(model, particles, blurs=(4.0, 0.0), progress=False)
    result.save(folder / "result")
    encoder = Encoder(model, new_network(model, 0.05, "block", 0).eval(), 1.1, ())
    encoder = replace(encoder, history=[{"epoch": 1, "train_loss": 2.0, "held_out_loss": 1.0}])
    encoder.save(folder / "encoder")
    result.population.save(folder / "population")
    return Given(
        closed=closed,
        opened=opened,
        modes=model.modes,
        model=model,
        dynamics=model.dynamics,
        beads=model.beads,
        bead_dynamics=model.bead_dynamics,
        microscope=model.microscope,
        particles=particles,
        in_memory=replace(particles, images=particles.read_images()),
        truth=particles.truth,
        result=result,
        framed=result.in_frame("A"),
        encoded=inference.encode(encoder, particles),
        population=result.population,
        motions=analysis.compute_pca(result),
        encoder=encoder,
        residual_encoder=inference.train_residual_encoder(
            result, draws=32, batch_size=16, progress=False
        ),
        map=images.reconstruct(particles, progress=False),
        comparison=analysis.compare_with_map(result, progress=False),
        latents=result.latents.clone(),
        conformations=conformations,
        covariance=inference.posterior_covariance(result, [0])[0].float(),
        saved=folder,
    )


# The verbs: name → call with what is given and a folder to write to.

VERBS: dict[str, Callable[[Given, Path], object]] = {
    # molecule
    "atom_beads": lambda g, f: molecule.atom_beads(g.closed, 3.0),
    "compare_beads": lambda g, f: molecule.compare_beads(
        g.closed, g.beads, molecule.atom_beads(g.closed)
    ),
    "residue_beads": lambda g, f: molecule.residue_beads(g.closed),
    "move_beads": lambda g, f: [
        molecule.move_beads(g.closed, beads, g.conformations)
        for beads in (g.beads, molecule.atom_beads(g.closed))
    ],
    "chain_names": lambda g, f: molecule.chain_names(g.closed.atoms),
    "compute_modes": lambda g, f: molecule.compute_modes(g.closed, 3, cache=False),
    "describe_change": lambda g, f: molecule.describe_change(
        g.closed, g.closed.node_coords, g.opened.node_coords
    ),
    "change_sentence": lambda g, f: molecule.change_sentence(
        molecule.describe_change(g.closed, g.closed.node_coords, g.opened.node_coords)
    ),
    "find_chain": lambda g, f: molecule.find_chain(g.closed, g.modes, "B", 1),
    "match_structures": lambda g, f: molecule.match_structures(g.closed, g.opened),
    "morph": lambda g, f: molecule.morph(g.closed, g.opened, 3),
    "with_reference_bonds": lambda g, f: molecule.with_reference_bonds(
        g.closed, g.closed.atoms.getCoords()[None]
    ),
    "pack_modes": lambda g, f: molecule.unpack_modes(*molecule.pack_modes(g.modes)),
    "pack_structure": lambda g, f: molecule.unpack_structure(*molecule.pack_structure(g.closed)),
    "rigid_fit": lambda g, f: molecule.rigid_fit(g.closed.coords, g.opened.coords),
    "screw_motion": lambda g, f: molecule.screw_motion(g.closed.coords, g.opened.coords),
    "superpose": lambda g, f: molecule.superpose(g.opened, g.closed),
    "load_structure": lambda g, f: molecule.load_structure(g.closed.atoms),
    "write_structure": lambda g, f: [
        molecule.write_structure(g.closed.atoms, "title", f / name) for name in ("a.pdb", "a.cif")
    ],
    # images
    "compute_fsc": lambda g, f: images.compute_fsc(g.map.volume, g.map.half1),
    "draw_volume": lambda g, f: images.draw_volume(
        g.bead_dynamics.reference, g.microscope.weight_tensor, g.microscope.variance_tensor, 32, 4.0
    ),
    "reconstruct": lambda g, f: [
        images.reconstruct(g.particles, **QUIET),
        images.reconstruct(g.in_memory, weights=g.latents[:, 0] ** 2, half_maps=False, **QUIET),
    ],
    "resolution_of": lambda g, f: images.resolution_of(g.map.fsc, 100.0),
    "scale_shells": lambda g, f: images.scale_shells(
        images.transform_volume(g.map.volume), g.map.fsc
    ),
    "sum_shells": lambda g, f: images.sum_shells(images.transform_volume(g.map.volume).abs()),
    "transform_volume": lambda g, f: images.untransform_volume(
        images.transform_volume(g.map.volume)
    ),
    "untransform_volume": lambda g, f: images.untransform_volume(
        images.transform_volume(g.map.volume)
    ),
    "filter_images": lambda g, f: images.filter_images(
        g.in_memory.read_images(), images.gaussian_transfer(32, g.model.pixel_size, 3.0)
    ),
    "noise_std_for_snr": lambda g, f: images.noise_std_for_snr(g.in_memory.read_images(), 0.0),
    "project": lambda g, f: images.project(
        g.bead_dynamics.reference[None], g.microscope.weight_tensor, 32, 4.0, 3.0
    ),
    "transform_tangents": lambda g, f: images.transform_tangents(
        g.bead_dynamics.reference[None, :, :2],
        g.bead_dynamics.reference[None, None, :, :2],
        g.microscope.weight_tensor,
        32,
        4.0,
        3.0,
        torch.ones(32, 17),
    ),
    "write_volume": lambda g, f: images.write_volume(
        f / "a.mrc", g.closed.coords[None, :8], 2.0, g.closed.origin
    ),
    "write_particles": lambda g, f: images.write_particles(
        f / "b.star",
        [g.in_memory.read_images()],
        rotations=g.particles.rotations,
        shifts=g.particles.shifts,
        pixel_size=g.particles.pixel_size,
        box_size=32,
        ctf=g.particles.ctf,
    ),
    # model
    "beads_of": lambda g, f: models.beads_of(g.closed),
    "can_change_frame": lambda g, f: models.can_change_frame(g.dynamics),
    "frame_jacobian": lambda g, f: [
        models.frame_jacobian(g.dynamics, g.latents).pose(g.particles.rotations, g.closed.origin),
        models.frame_jacobian(g.dynamics, g.latents, "B"),
    ],
    "in_frame": lambda g, f: [
        models.in_frame(g.dynamics, g.latents).image_shifts(g.particles.rotations, g.closed.origin),
        models.in_frame(g.dynamics, g.latents, "B").turns,
    ],
    "superposed": lambda g, f: models.superposed(g.dynamics, g.truth.coords()),
    "elastic_prior": lambda g, f: models.elastic_prior(g.dynamics),
    "elastic_variance": lambda g, f: models.elastic_variance(g.dynamics),
    "mode_limit": lambda g, f: models.mode_limit(g.dynamics),
    "pack_model": lambda g, f: models.unpack_model(*models.pack_model(g.model)),
    "require_population": lambda g, f: models.require_population(g.model, g.population),
    "require_same_images": lambda g, f: models.require_same_images(g.model, g.particles),
    "require_same_model": lambda g, f: models.require_same_model(
        g.model, g.population.fingerprint, "a population"
    ),
    "rotvec_to_matrix": lambda g, f: models.rotvec_to_matrix(g.latents[:, :3]),
    "matrix_to_rotvec": lambda g, f: models.matrix_to_rotvec(g.particles.rotations),
    "shrink_covariance": lambda g, f: models.shrink_covariance(
        g.population.covariance, 5, models.elastic_prior(g.dynamics)
    ),
    "with_less_rest": lambda g, f: models.with_less_rest(g.population.covariance, 1, 0.5),
    "simulate_particles": lambda g, f: [
        models.simulate_particles(
            g.closed, 3, conformations=g.conformations, box_size=32, progress=False
        ),
        models.simulate_particles(
            g.closed,
            N,
            dynamics=g.dynamics,
            latents=g.latents,
            box_size=32,
            path=f / "b.star",
            progress=False,
        ),
    ],
    # inference
    "correct_reference": lambda g, f: inference.correct_reference(g.result),
    "encode": lambda g, f: [
        inference.encode(g.encoder, g.particles),
        inference.encode(g.residual_encoder, g.particles),
    ],
    "information_limit": lambda g, f: [
        inference.information_limit(g.model, g.particles),
        inference.information_limit(g.model, g.particles, g.population, g.latents),
    ],
    "plain_ids": lambda g, f: images.plain_ids(g.particles.ids),
    "estimate": lambda g, f: inference.estimate(g.model, g.particles, g.population, **QUIET),
    "frame_words": lambda g, f: inference.frame_words(g.result.frame),
    "require_finite_latents": lambda g, f: inference.require_finite_latents(g.latents),
    "load_result": lambda g, f: inference.load_result(g.saved / "result", g.particles),
    "measure_bending": lambda g, f: inference.measure_bending(g.model, g.latents, None),
    "measure_contrast": lambda g, f: inference.measure_contrast(g.model, g.particles),
    "normal_equations": lambda g, f: [
        inference.normal_equations(
            g.model,
            batch.images,
            batch.pose,
            g.latents,
            noise_spectrum=g.population.noise_spectrum,
            sampler=lambda rows, _: (g.latents[rows], g.result.scale[rows]),
        ).gradient(g.result.scale)
        for batch in g.particles.batches(N)
    ],
    "position_variance": lambda g, f: inference.position_variance(
        g.bead_dynamics, g.latents[:1], g.particles.rotations[:1], g.covariance[None]
    ),
    "check": lambda g, f: [
        inference.check(g.model, particles, n=8) for particles in (g.particles, g.in_memory)
    ],
    "posterior_covariance": lambda g, f: [
        inference.posterior_covariance(g.result, [0, 3]),
        inference.posterior_covariance(g.framed, [0, 3]),
    ],
    "refine": lambda g, f: [
        inference.refine(g.model, g.particles, blurs=(4.0, 0.0), **QUIET),
        inference.refine(
            g.model,
            g.in_memory,
            g.population,
            start=g.encoded,
            blurs=(0.0,),
            checkpoint=f / "checkpoint",
            **QUIET,
        ),
        inference.refine(g.model, g.particles, start=g.latents, blurs=(0.0,), **QUIET),
    ],
    "remove_run_states": lambda g, f: inference.remove_run_states(f),
    "require_same_ids": lambda g, f: inference.require_same_ids(
        g.result.ids, g.particles.ids, "particles"
    ),
    "rmsd": lambda g, f: inference.rmsd(g.result.decode(), g.truth.coords()),
    "score": lambda g, f: [
        inference.score(g.result, g.motions),
        inference.score(g.framed, g.motions, frame="poses"),
    ],
    "correlation": lambda g, f: inference.correlation(g.motions.scores[:, 0], g.truth.coordinate),
    "train_encoder": lambda g, f: inference.train_encoder(
        g.model,
        g.particles[:6],
        g.in_memory[6:],
        width=0.05,
        epochs=2,
        checkpoint=f / "training",
        **QUIET,
    ),
    "train_residual_encoder": lambda g, f: inference.train_residual_encoder(
        g.result, draws=32, batch_size=16, checkpoint=f / "residual training", **QUIET
    ),
    "true_latents": lambda g, f: inference.true_latents(g.model, g.particles),
    "true_population": lambda g, f: inference.true_population(g.model, g.particles, g.latents),
    # analysis
    "compare_halves": lambda g, f: analysis.compare_halves(g.result, blurs=(4.0, 0.0), **QUIET),
    "plot_halves": lambda g, f: drawn(
        plots.plot_halves(analysis.compare_halves(g.result, blurs=(4.0, 0.0), **QUIET))
    ),
    "compare_ends": lambda g, f: [
        analysis.compare_ends(g.motions, share=0.5, **few) for few in (QUIET, of_images(g))
    ],
    "compare_with_map": lambda g, f: [
        analysis.compare_with_map(g.result, **QUIET),
        analysis.compare_with_map(g.framed, other=g.latents[0], **of_images(g)).residual,
    ],
    "split_noise": lambda g, f: analysis.split_noise(g.result, blurs=(4.0, 0.0), **QUIET),
    "atom_uncertainty": lambda g, f: analysis.atom_uncertainty(
        g.dynamics, g.latents[0], g.covariance
    ),
    "average_covariance": lambda g, f: analysis.average_covariance(g.result, 3),
    "bending_table": lambda g, f: analysis.bending_table(g.result),
    "component_errors": lambda g, f: analysis.component_errors(g.motions, g.covariance),
    "compute_pca": lambda g, f: analysis.compute_pca(g.result, chain="B", kind="rigid"),
    "decode_ensemble": lambda g, f: analysis.decode_ensemble(g.model, g.latents),
    "decode_one": lambda g, f: analysis.decode_one(g.dynamics, g.latents[0]),
    "density_table": lambda g, f: [
        analysis.density_table(g.result),
        analysis.density_table(with_other_beads(g.result)),
    ],
    "describe_motion": lambda g, f: analysis.describe_motion(g.motions),
    "latent_names": lambda g, f: analysis.latent_names(g.dynamics),
    "latent_table": lambda g, f: [
        analysis.latent_table(g.result),
        analysis.latent_table(g.framed, frame="B"),
    ],
    "motion_sentence": lambda g, f: analysis.motion_sentence(g.motions),
    "particle_columns": lambda g, f: analysis.particle_columns(
        g.result, pd.DataFrame({"a": range(N)})
    ),
    "point_density": lambda g, f: analysis.point_density(*g.motions.scores[:, :2].T),
    "save_conformations": lambda g, f: [
        analysis.save_conformations(f / name, g.model, g.latents[:2])
        for name in ("a.pdb", "b.cif", "c.dcd", "d.cxc")
    ],
    "save_densities": lambda g, f: analysis.save_densities(f / "a.mrc", g.model, g.latents[:2]),
    "save_selection": lambda g, f: analysis.save_selection(f, g.motions, np.array([1, 5])),
    # view
    "save_motion": lambda g, f: [
        cryochains.view.save_motion(f / name, g.motions, n=3)
        for name in ("a.pdb", "b.cif", "c.dcd", "d.cxc", "e.gif", "f.mrc")
    ],
    "explore": lambda g, f: with_widgets(cryochains.view.explore, g.result),
    "view_modes": lambda g, f: with_widgets(cryochains.view.view_modes, g.closed, g.modes),
    "view_structure": lambda g, f: with_widgets(cryochains.view.view_structure, g.closed),
    "plot_particles": lambda g, f: drawn(plots.plot_particles(g.result, 2)),
    "plot_check": lambda g, f: drawn(plots.plot_check(inference.check(g.model, g.particles))),
    "plot_map_comparison": lambda g, f: drawn(plots.plot_map_comparison(g.comparison)),
    "plot_training": lambda g, f: drawn(plots.plot_training(g.encoder)),
    "plot_refinement": lambda g, f: drawn(plots.plot_refinement(g.result)),
    "plot_latent_space": lambda g, f: drawn(
        plots.plot_latent_space(g.motions, truth=g.truth.coordinate.numpy())
    ),
    "plot_rmsd": lambda g, f: drawn(plots.plot_rmsd(*per_particle(g))),
    "plot_conformations": lambda g, f: drawn(plots.plot_conformations(g.motions)),
    "plot_explorer": lambda g, f: drawn(plots.plot_explorer(g.motions)),
    "plot_structure": lambda g, f: drawn(plots.plot_structure(g.closed)),
    "plot_modes": lambda g, f: drawn(plots.plot_modes(g.closed, g.modes)),
    "plot_residue_motion": lambda g, f: drawn(plots.plot_residue_motion(g.model, g.latents[:3])),
    # Methods of nouns
    "Model.to": lambda g, f: g.model.to("meta"),
    "Model.with_beads": lambda g, f: [
        g.model.with_beads(beads).render(g.latents, g.particles.rotations)
        for beads in (None, molecule.atom_beads(g.closed, 4.0))
    ],
    "Model.decode": lambda g, f: g.model.decode(g.latents),
    "Model.render": lambda g, f: [
        g.model.render(g.latents, *batch.pose) for batch in g.particles.batches(N)
    ],
    "Result.decode": lambda g, f: g.result.decode([1, 2]),
    "Result.save": lambda g, f: [g.result.save(f / "r"), g.framed.save(f / "s")],
    "Result.in_frame": lambda g, f: [
        g.result.in_frame(),
        g.result.in_frame("B").pose_correction,
        g.framed.in_frame("A"),
        g.framed.in_frame("poses"),
    ],
    "Result.__getitem__": lambda g, f: [
        g.result[3],
        g.result[::-2],
        g.result[[4, 1]],
        g.framed[2:],
    ],
    "Population.save": lambda g, f: g.population.save(f / "p"),
    "Population.tensors": lambda g, f: g.population.tensors(),
    "Population.description": lambda g, f: g.population.description(),
    "Population.restore": lambda g, f: Population.restore(
        g.population.tensors(), g.population.description()
    ),
    "PrincipalMotions.transform": lambda g, f: [
        g.motions.transform(g.encoded),
        g.motions.transform(g.latents),
    ],
    "PrincipalMotions.traverse": lambda g, f: g.motions.traverse(1),
    "Map.save": lambda g, f: g.map.save(f / "m.mrc"),
    "Encoder.save": lambda g, f: g.encoder.save(f / "e"),
    "ParticleStack.digest": lambda g, f: g.particles.digest(),
    "ParticleStack.image_digest": lambda g, f: g.particles.image_digest(),
    "ParticleStack.metadata_digest": lambda g, f: g.particles.metadata_digest(),
    "ParticleStack.read_images": lambda g, f: g.particles.read_images([2]).add_(1.0),
    "ParticleStack.batches": lambda g, f: [
        batch.images.add_(1.0)
        for stack in (g.particles, g.in_memory)
        for batch in stack.batches(3, seed=1)
    ],
    "ParticleStack.split": lambda g, f: g.particles.split(),
    "ParticleStack.save": lambda g, f: [
        g.particles.save(f / "c.star"),
        g.particles[::2].save(f / "d.star", images=False),
    ],
    "Dynamics.to": lambda g, f: g.dynamics.to("meta"),
    "Dynamics.with_structure": lambda g, f: g.dynamics.with_structure(g.closed.all_atoms()),
    "Dynamics.with_beads": lambda g, f: g.dynamics.with_beads(g.beads).decode(g.latents),
    "Dynamics.all_atoms": lambda g, f: g.dynamics.all_atoms().decode(g.latents),
    "Dynamics.bend": lambda g, f: g.dynamics.bend(g.latents, 0),
    "Dynamics.rotvecs": lambda g, f: g.dynamics.rotvecs(g.latents, 0),
    "Dynamics.decode": lambda g, f: g.dynamics.decode(g.latents.double()),
    "Dynamics.tangents": lambda g, f: g.dynamics.tangents(g.latents, 1, g.particles.rotations),
    "Dynamics.gram": lambda g, f: g.dynamics.gram(g.latents),
    "Dynamics.fit": lambda g, f: g.dynamics.fit(g.conformations),
    "Microscope.to": lambda g, f: g.microscope.to("meta"),
    "Microscope.image_positions": lambda g, f: g.microscope.image_positions(
        g.bead_dynamics.reference[None], g.particles.rotations[:1], g.particles.shifts[:1]
    ),
    "Microscope.spectrum": lambda g, f: [
        g.microscope.spectrum(
            g.bead_dynamics.reference[None, :, :2],
            torch.ones(box, box // 2 + 1),
            blur=blur,
            variance=torch.full((1, len(g.beads)), 2.0),
            box_size=box,
        )
        for blur, box in ((0.0, 32), (9.0, 16))
    ],
    "Microscope.tangent_spectra": lambda g, f: [
        g.microscope.tangent_spectra(
            g.bead_dynamics.reference[None, :, :2],
            g.bead_dynamics.reference[None, None, :, :2],
            slice(0, len(g.beads)),
            torch.ones(box, box // 2 + 1),
            blur=blur,
            variance=torch.full((1, len(g.beads)), 2.0),
            box_size=box,
        )
        for blur, box in ((0.0, 32), (9.0, 16))
    ],
    "Microscope.render": lambda g, f: [
        g.microscope.render(
            g.bead_dynamics.reference[None],
            g.particles.rotations[:1],
            g.particles.shifts[:1],
            blur=blur,
        )
        for blur in (0.0, 9.0)
    ],
    "fits_pdb_text": lambda g, f: molecule.fits_pdb_text(g.closed.atoms),
    "Structure.all_atoms": lambda g, f: g.closed.all_atoms(),
    "Structure.as_domains": lambda g, f: g.closed.as_domains(),
    "Structure.as_one_body": lambda g, f: g.closed.as_one_body(),
    "Structure.with_coords": lambda g, f: g.closed.with_coords(g.closed.atoms.getCoords() + 1),
    "Structure.with_origin": lambda g, f: g.closed.with_origin([1.0, 2.0, 3.0]),
    "Structure.with_turning": lambda g, f: g.closed.with_turning("A"),
    "Structure.save": lambda g, f: [g.closed.save(f / name) for name in ("s.pdb", "s.cif")],
    "Truth.distinct_rows": lambda g, f: g.truth.distinct_rows(),
    "Truth.coords": lambda g, f: g.truth.coords([1]).add_(1.0),
    "Truth.__getitem__": lambda g, f: g.truth[[1, 2]],
}

# These take numbers, texts or files alone.
TAKE_NONE_OF_THEM = {
    "gaussian_transfer",
    "load_encoder",
    "load_particles",
    "load_population",
    "open_source",
    "pixel_grid",
    "positions",
    "quiet_prody",
    "random_rotations",
    "require_count",
    "source_path",
    "soft_sphere",
    "unpack_model",
    "unpack_modes",
    "unpack_structure",
}
NOUNS = (
    Model,
    Result,
    Population,
    analysis.PrincipalMotions,
    Encoder,
    Map,
    ParticleStack,
    Dynamics,
    Microscope,
    Structure,
    Truth,
)
PACKAGES = (
    cryochains,
    cryochains.molecule,
    cryochains.images,
    cryochains.model,
    cryochains.inference,
    cryochains.analysis,
    cryochains.view,
)


def with_widgets(view, *arguments):
    """Outside a notebook: a warning, and the figure; without the extras the verb says so."""
    for name in ("ipywidgets", "nglview", "jscatter"):
        pytest.importorskip(name)
    with pytest.warns(UserWarning, match="expected a notebook"):
        return drawn(view(*arguments))


def with_other_beads(result: Result) -> Result:
    """As if the images had asked for half of everything."""
    beads = replace(result.model.beads, weights=result.model.beads.weights / 2)
    return replace(result, population=replace(result.population, beads=beads))


def drawn(figure):
    figure.canvas.draw()
    return figure


def of_images(g):
    return {"images": g.in_memory, "progress": False}


def per_particle(g):
    scores = inference.score(g.result)
    return {"refined": scores.rmsd_per_particle}, scores.mean_rmsd_per_particle


def test_the_table_of_verbs_is_complete():
    public = set()
    for package in PACKAGES:
        members = {name: getattr(package, name) for name in package.__all__}
        public |= {name for name, member in members.items() if inspect.isfunction(member)}
    own = [name for name, member in vars(plots).items() if is_own_function(plots, member)]
    public |= {name for name in own if not name.startswith("_")}
    for noun in NOUNS:
        methods = [name for name, member in vars(noun).items() if is_method(member)]
        public |= {f"{noun.__name__}.{name}" for name in methods if not name.startswith("_")}
    missing = public - VERBS.keys() - TAKE_NONE_OF_THEM
    assert not missing, f"add to VERBS how each is called: {sorted(missing)}"
    special = {name for name in VERBS if "__" in name}
    assert VERBS.keys() - special <= public, "verbs that are no longer public"
    assert public >= TAKE_NONE_OF_THEM


def is_own_function(module, member) -> bool:
    return inspect.isfunction(member) and member.__module__ == module.__name__


def is_method(member) -> bool:
    return inspect.isfunction(member) or isinstance(member, (classmethod, staticmethod))


def state_of_the_caller() -> tuple:
    random = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
    legacy = hashlib.sha256(np.random.get_state()[1].tobytes()).hexdigest()
    return (
        random,
        legacy,
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
    )


@pytest.mark.parametrize("verb", VERBS)
def test_nothing_is_changed(given, verb, tmp_path):
    before = snapshot(given)
    caller = state_of_the_caller()
    VERBS[verb](given, tmp_path)
    assert_same(before, snapshot(given))
    assert state_of_the_caller() == caller, "random numbers, threads and gradients of the caller"


# Where a verb is interrupted: a method that many pass through, and which of its calls.
CUTS = [
    (Dynamics, "decode", 0),
    (Dynamics, "decode", 2),
    (Dynamics, "tangents", 1),
    (Microscope, "image_positions", 1),
    (Images, "read", 0),
    (Images, "read", 1),
]
# How many of them at least reach each verb.
ARE_CUT = {
    "refine": 6,
    "information_limit": 4,
    "posterior_covariance": 3,
    "train_encoder": 5,
    "score": 1,
    "encode": 1,
    "measure_contrast": 1,
    "plot_particles": 2,
    "normal_equations": 3,
    "save_motion": 1,
}


@pytest.mark.parametrize("verb", VERBS)
def test_nothing_is_changed_when_it_is_interrupted(given, verb, tmp_path):
    before = snapshot(given)
    caller = state_of_the_caller()
    n_calls = count_calls(lambda: VERBS[verb](given, new_folder(tmp_path)))
    n_cut = 0
    for owner, name, n_before in CUTS:
        if n_calls[owner, name] <= n_before:
            continue
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, interrupting(getattr(owner, name), n_before))
            VERBS[verb](given, new_folder(tmp_path))
        n_cut += 1
        assert_same(before, snapshot(given))
    assert state_of_the_caller() == caller
    assert n_cut >= ARE_CUT.get(verb, 0)


def new_folder(parent: Path) -> Path:
    folder = parent / str(len(list(parent.iterdir())))
    folder.mkdir()
    return folder


def count_calls(run: Callable[[], object]) -> dict[tuple, int]:
    """How often the methods that are cut are called."""
    counts = {(owner, name): 0 for owner, name, _ in CUTS}

    def counting(key):
        method = getattr(*key)

        def call(*args, **kwargs):
            counts[key] += 1
            return method(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for key in counts:
            patch.setattr(*key, counting(key))
        run()
    return counts


def interrupting(method, n_calls: int):
    """The method, until it has been called so often; then Ctrl-C."""
    calls = []

    def call(*args, **kwargs):
        if len(calls) == n_calls:
            raise KeyboardInterrupt
        calls.append(1)
        return method(*args, **kwargs)

    return call


def with_a_broken_image(given: Given) -> Given:
    pixels = given.in_memory.read_images()
    pixels[0, 3, 3] = torch.nan
    broken = replace(given.in_memory, images=pixels)
    return replace(
        given,
        particles=broken,
        in_memory=broken,
        result=replace(given.result, particles=broken),
    )


@pytest.mark.parametrize("verb", ["encode", "train_encoder"])
def test_nothing_is_changed_when_an_image_is_no_number(given, verb, tmp_path):
    given = with_a_broken_image(given)
    before = snapshot(given)
    with pytest.raises(ValueError, match="expected finite pixels, got NaN or Inf in image"):
        VERBS[verb](given, tmp_path)
    assert_same(before, snapshot(given))


def test_nothing_is_changed_when_an_image_that_is_no_number_is_left_out(given, tmp_path):
    given = with_a_broken_image(given)
    before = snapshot(given)
    with pytest.warns(UserWarning, match="1 of 10 images are left out: 1 hold NaN or Inf"):
        VERBS["refine"](given, tmp_path)
    assert_same(before, snapshot(given))
    VERBS["measure_contrast"](given, tmp_path)
    assert_same(before, snapshot(given))


def test_the_limit_leaves_the_model_alone_when_it_refuses(given):
    """Once it left the model with another brightness for good."""
    before = snapshot(given)
    silent = replace(given.population, noise_std=0.0)
    with pytest.raises(ValueError, match="expected noisy particles"):
        inference.information_limit(given.model, given.particles, silent)
    assert_same(before, snapshot(given))


# The test itself


def test_changes_would_be_seen(given):
    """Each of these is what a verb might do by mistake; it is undone at once."""
    changes = {
        "a latent": given.result.latents,
        "a mode": given.modes.vectors[0],
        "a cached tensor": given.dynamics.mode_vectors[1],
        "a bead": given.beads.coords,
        "a weight": next(given.encoder.network.parameters()).data,
        "the mean": given.population.mean,
        "an image": given.in_memory.images.stacks[0],
        "a pose": given.particles.rotations,
        "a defocus": given.particles.ctf.defocus_u,
        "a score": given.motions.scores,
        "the truth": given.truth.conformations,
    }
    for name, array in changes.items():
        before = snapshot(given)
        kept = array.ravel()[0].item()
        array.ravel()[:1] += 1
        with pytest.raises(AssertionError):
            assert_same(before, snapshot(given))
        array.ravel()[:1] = kept
        assert_same(before, snapshot(given))
        assert name
    before = snapshot(given)
    betas = given.closed.atoms.getBetas()
    given.closed.atoms.setBetas(betas + 1)
    with pytest.raises(AssertionError, match="closed.atoms.beta"):
        assert_same(before, snapshot(given))
    given.closed.atoms.setBetas(betas)
    given.encoder.network.train()
    with pytest.raises(AssertionError, match="encoder.network.training"):
        assert_same(before, snapshot(given))
    given.encoder.network.eval()
    assert_same(before, snapshot(given))

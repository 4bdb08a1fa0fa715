"""The boundary: every wrong argument and every foreign file is refused in one sentence, or valid.

`WRONG` says, argument by argument, which values are none of it; `VALID` which unusual ones are.
Damaged and foreign files follow. A case fails that ends in an exception of another library
("foreign"), in silence, or not at all.
"""

import gzip
import json
import math
import os
import re
import signal
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cryochains as cc
from cryochains import analysis, images, inference, molecule
from cryochains._files import load_tensors, save_tensors
from cryochains.inference.encoder import Encoder, new_network

# Seconds; none takes so long, whatever it is given.
LIMIT = 20
OURS = (ValueError, FileNotFoundError, IndexError, ImportError)


@cache
def things() -> SimpleNamespace:
    """One of each noun: a dimer, 16 particles of 32 px, and what was refined of them."""
    structures = cc.load_structure("glua3-closed"), cc.load_structure("glua3-open")
    closed, opened = cc.match_structures(*structures)
    opened = cc.superpose(opened, closed)
    path = cc.morph(closed, opened, n=4)
    quiet = {"progress": False, "device": "cpu"}
    particles = cc.simulate_particles(closed, 16, conformations=path, box_size=32, **quiet)
    rigid = cc.Model(closed, particles, modes=None)
    result = cc.refine(rigid, particles, blurs=(4.0, 0.0), check=False, **quiet)
    with warnings.catch_warnings(action="ignore"):
        again = cc.analysis.compute_pca(result)
    encoder = Encoder(rigid, new_network(rigid, 0.1, "block", 0), 1.0, ())
    modes = cc.compute_modes(closed, 2)
    reconstructed = cc.reconstruct(particles, progress=False)
    return SimpleNamespace(
        structure=closed,
        opened=opened,
        particles=particles,
        model=rigid,
        result=result,
        motions=again,
        encoder=encoder,
        modes=modes,
        population=result.population,
        map=reconstructed,
        coords=closed.coords,
        all_coords=closed.atoms.getCoords(),
        dynamics=rigid.dynamics,
        latents=result.latents,
    )


# Values by name; what is made of the nouns is a function of them.
VALUES = {
    "None": None,
    "text": "ten",
    "no text": "",
    "bytes": b"3",
    "NaN": math.nan,
    "infinity": math.inf,
    "-infinity": -math.inf,
    "-1": -1,
    "0": 0,
    "0.0": 0.0,
    "1": 1,
    "2": 2,
    "3": 3,
    "2.5": 2.5,
    "2.0": 2.0,
    "7": 7,
    "-0.5": -0.5,
    "1.5": 1.5,
    "99": 99,
    "-99": -99,
    "10**30": 10**30,
    "1e300": 1e300,
    "True": True,
    "False": False,
    "complex": 1 + 2j,
    "list": [1, 2],
    "list of text": ["a", "b"],
    "empty list": [],
    "ragged list": [[1.0, 2.0], [3.0]],
    "set": {1, 2},
    "dict": {"a": 1},
    "object": object(),
    "type": int,
    "function": len,
    "array (3,)": np.ones(3),
    "array (2, 2)": np.ones((2, 2)),
    "array of NaN": np.array(math.nan),
    "array of True": np.array(True),
    "array of text": np.array(["a", "b", "c"]),
    "array of objects": np.array([None, {}, "a"], dtype=object),
    "array of complex": np.ones(3, dtype=complex),
    "empty array": np.zeros((0, 3)),
    "tensor [1, 2]": torch.tensor([1, 2]),
    "NUL": "a\0b",
    "long path": "x" * 5000,
    "long name": "x" * 300 + ".star",
    "bytes path": b"a.star",
    "class": cc.Model,
    "fractions": [0.5, 1.5],
    "(5,)": (5,),
    "(5, 95, 99)": (5, 95, 99),
    "(5, 200)": (5, 200),
    "(-5, 95)": (-5, 95),
    "(NaN, 95)": (math.nan, 95),
    "(text, text)": ("a", "b"),
    "(1, inf)": (1.0, math.inf),
    "(4, -1)": (4.0, -1.0),
    "(4, NaN)": (4.0, math.nan),
    "(True,)": (True,),
    "cuda:99": "cuda:99",
    "meta": "meta",
    "gpu": "gpu",
    "mask of 3": np.array([True, False, True]),
    "[0.5]": [0.5],
    "[[0, 1]]": [[0, 1]],
    "[99]": [99],
    "[True, 1]": [True, 1],
    "3 shares of text": "0.8",
    "31": 31,
    "64-bit": 2**64,
}
# From the nouns.
MADE = {
    "a structure": lambda g: g.structure,
    "a model": lambda g: g.model,
    "particles": lambda g: g.particles,
    "a result": lambda g: g.result,
    "motions": lambda g: g.motions,
    "modes": lambda g: g.modes,
    "an encoder": lambda g: g.encoder,
    "a population": lambda g: g.population,
    "a map": lambda g: g.map,
    "ProDy atoms": lambda g: g.structure.atoms,
    "list of it": lambda g: [g.structure, g.structure],
    "images": lambda g: g.particles.read_images(),
    "coords": lambda g: g.coords,
    "coords with NaN": lambda g: with_one(g.all_coords, math.nan),
    "coords with infinity": lambda g: with_one(g.all_coords, math.inf),
    "imaging coords with NaN": lambda g: with_one(g.coords, math.nan),
    "coords of 2 columns": lambda g: g.all_coords[:, :2],
    "one atom fewer": lambda g: g.all_coords[1:],
    "imaging atoms, one fewer": lambda g: g.coords[1:],
    "coords as text": lambda g: g.all_coords.astype(str),
    "coords as complex": lambda g: g.all_coords.astype(complex),
    "coords as objects": lambda g: np.full(g.all_coords.shape, None, dtype=object),
    "latents with NaN": lambda g: torch.full_like(g.latents, math.nan),
    "latents (p + 1)": lambda g: torch.zeros(len(g.latents), g.model.n_latents + 1),
    "latents (N - 1)": lambda g: g.latents[1:],
    "latents (p,)": lambda g: g.latents[0],
    "latents of complex": lambda g: g.latents.to(torch.complex64),
    "latents of bool": lambda g: torch.ones(g.latents.shape, dtype=torch.bool),
    "latents (0, p)": lambda g: g.latents[:0],
    "negative weights": lambda g: -np.ones(len(g.particles)),
    "weights with NaN": lambda g: np.full(len(g.particles), math.nan),
    "15 weights": lambda g: np.ones(len(g.particles) - 1),
    "weights of text": lambda g: ["one"] * len(g.particles),
    "no particles": lambda g: g.particles[:0],
    "no result": lambda g: g.result[:0],
    "eye (3, 3)": lambda g: np.eye(3),
    "zeros as rotations": lambda g: np.zeros((16, 3, 3)),
    "mirrors as rotations": lambda g: -np.tile(np.eye(3), (16, 1, 1)),
    "rotations with NaN": lambda g: np.full((16, 3, 3), math.nan),
    "rotations of text": lambda g: np.full((16, 3, 3), "a"),
    "shifts with NaN": lambda g: np.full((16, 2), math.nan),
    "shifts (16, 3)": lambda g: np.zeros((16, 3)),
    "images with 31 px": lambda g: np.zeros((16, 31, 31)),
    "images 32 × 30": lambda g: np.zeros((16, 32, 30)),
    "one image": lambda g: np.zeros((32, 32)),
    "images of text": lambda g: np.full((16, 32, 32), "a"),
    "images of complex": lambda g: np.ones((16, 32, 32), dtype=complex),
    "15 ids": lambda g: list(range(15)),
    "ids of None": lambda g: [None] * 16,
    "ids of floats": lambda g: [0.5] * 16,
    "mask (8, 8, 8)": lambda g: np.ones((8, 8, 8)),
    "mask of NaN": lambda g: np.full((32, 32, 32), math.nan),
    "mask of text": lambda g: np.full((32, 32, 32), "a"),
    "table of text": lambda g: __import__("pandas").DataFrame({"a": ["x"] * 16}),
    "table of 3 rows": lambda g: __import__("pandas").DataFrame({"a": [1.0] * 3}),
    "columns of text": lambda g: {"a": ["x"] * 16},
    "columns of 3": lambda g: {"a": [1.0] * 3},
    "columns of NaN": lambda g: {"a": [math.nan] * 16},
}


def with_one(coords, value):
    coords = np.array(coords)
    coords[0, 0] = value
    return coords


NOUNS = (
    "a structure",
    "a model",
    "particles",
    "a result",
    "motions",
    "modes",
    "an encoder",
    "a population",
)


def noun(*own):
    """Kinds of values that are not this noun."""
    others = [name for name in NOUNS if name not in own]
    return ["None", "text", "1", "dict", "class", "empty list", *others]


COUNT = "None|text|bytes|NaN|infinity|-1|0|2.5|2.0|True|list|dict|complex|10**30|array (3,)".split(
    "|"
)
FEW_COUNT = "text|NaN|-1|0|2.5|True|list|10**30".split("|")
FLAG = "None|text|no text|2|2.5|NaN|list|array (3,)".split("|")
FEW_FLAG = "text|2|empty list".split("|")
SEED = "None|text|bytes|NaN|-1|2.5|True|list|complex|dict".split("|")
FEW_SEED = "text|-1|2.5|True".split("|")
POSITIVE = "text|bytes|NaN|infinity|-1|0|True|list|dict|complex|array (3,)|object".split("|")
NUMBER = "None|text|bytes|NaN|True|list|dict|complex|array (3,)".split("|")
CHOICE = "text|no text|2|bytes|True|empty list|dict|NaN".split("|")
PATH = "None|3|2.5|bytes path|no text|NUL|long path|list|dict|True|object".split("|")
FEW_PATH = "None|3|bytes path|NUL|long path|empty list".split("|")
DEVICE = "gpu|cuda:99|meta|2.5|empty list|dict|True|bytes".split("|")
FEW_DEVICE = "gpu|meta|2.5|empty list".split("|")
ROWS = "None|text|2.5|99|-99|True|[0.5]|[99]|[[0, 1]]|mask of 3|dict|set|complex|[True, 1]".split(
    "|"
)
PERCENTILES = "None|text|5|(5,)|(5, 95, 99)|(5, 200)|(-5, 95)|(NaN, 95)|(text, text)".replace(
    "|5|", "|7|"
).split("|")
COMPONENT = "None|text|NaN|-1|99|2.5|True|list|10**30".split("|")
LATENTS = (
    "text|dict|1|complex|latents with NaN|latents (p + 1)|latents (N - 1)|latents (p,)|"
    "latents of complex|ragged list|a result|array of text|array of objects"
).split("|")
DECODED = [name for name in LATENTS if name not in ("latents (N - 1)",)]
SETTINGS = {"batch_size": COUNT, "device": DEVICE, "progress": FLAG}
FEW_SETTINGS = {"batch_size": FEW_COUNT, "device": FEW_DEVICE, "progress": FEW_FLAG}

# Function → how it is called with good arguments, and argument → names of wrong values.
WRONG = {
    "load_structure": (
        lambda g, tmp: (cc.load_structure, {"source": "glua3-closed"}),
        {
            "source": [*PATH, "a model", "particles", "class", "list of it", "NaN", "text"],
            "chains": ["text", "3", "no text", "empty list", "list", "dict", "True", "NaN"],
            "atoms": [*CHOICE, "None"],
            "bodies": [*CHOICE, "a structure"],
        },
    ),
    "match_structures": (
        lambda g, tmp: (cc.match_structures, {"a": g.structure, "b": g.opened}),
        {"a": [*noun("a structure"), "ProDy atoms", "coords"], "b": noun("a structure")},
    ),
    "superpose": (
        lambda g, tmp: (cc.superpose, {"mobile": g.opened, "target": g.structure}),
        {"mobile": [*noun("a structure"), "coords"], "target": noun("a structure")},
    ),
    "morph": (
        lambda g, tmp: (cc.morph, {"a": g.structure, "b": g.opened, "n": 3}),
        {"a": noun("a structure"), "b": [*noun("a structure"), "coords"], "n": [*COUNT, "1"]},
    ),
    "compute_modes": (
        lambda g, tmp: (cc.compute_modes, {"structure": g.structure, "n_modes": 2}),
        {
            "structure": noun("a structure"),
            "n_modes": "None|text|NaN|-1|2.5|True|dict|complex|10**30|array (3,)|fractions|(5,)|"
            "(True,)|(text, text)|list of text|modes".split("|"),
            "cutoff": [*POSITIVE, "1e300"],
            "cache": FLAG,
            "springs": [*CHOICE, "None"],
        },
    ),
    "Structure.with_coords": (
        lambda g, tmp: (g.structure.with_coords, {"coords": g.all_coords}),
        {
            "coords": "None|text|1|dict|coords with NaN|coords with infinity|coords of 2 columns|"
            "one atom fewer|coords as text|coords as complex|coords as objects|ragged list|"
            "empty list|a structure".split("|")
        },
    ),
    "Structure.with_origin": (
        lambda g, tmp: (g.structure.with_origin, {"xyz": (0, 0, 0)}),
        {
            "xyz": "None|text|1|dict|list|array of NaN|array (2, 2)|array of text|set|"
            "array of objects|array of complex|ragged list|a structure".split("|")
        },
    ),
    "Structure.with_turning": (
        lambda g, tmp: (lambda body: g.structure.with_turning(body), {"body": "A"}),
        {"body": "None|text|1|no text|list|True|list of text|a structure".split("|")},
    ),
    "Structure.save": (
        lambda g, tmp: (g.structure.save, {"path": tmp / "a.pdb"}),
        {"path": [*PATH, "text"]},
    ),
    "describe_change": (
        lambda g, tmp: (molecule.describe_change, change_of(g)),
        {
            "structure": noun("a structure"),
            "before": "None|text|imaging coords with NaN|imaging atoms, one fewer|1".split("|"),
            "after": "None|text|imaging coords with NaN|imaging atoms, one fewer|dict".split("|"),
        },
    ),
    "load_particles": (
        lambda g, tmp: (cc.load_particles, {"path": saved_star(g, tmp)}),
        {
            "path": [*PATH, "long name", "a structure", "particles"],
            "invert": FLAG,
            "box_size": "text|NaN|-1|0|2.5|True|list|31|99|10**30|complex".split("|"),
            "datadir": "3|bytes path|NUL|dict|True|empty list|no text".split("|"),
            "passthrough": "3|text|bytes path|dict|True|list|NUL".split("|"),
            "optics_group": "text|2.5|True|list|dict|NaN|bytes".split("|"),
            "pixel_size": POSITIVE,
            "voltage_kv": POSITIVE,
            "spherical_aberration_mm": "text|NaN|infinity|True|list|complex|dict".split("|"),
            "amplitude_contrast": "text|NaN|infinity|-0.5|1.5|7|True|list|complex".split("|"),
        },
    ),
    "ParticleStack": (
        lambda g, tmp: (cc.ParticleStack, stack_of(g)),
        {
            "images": "None|text|1|dict|images with 31 px|images 32 × 30|one image|images of text|"
            "images of complex|array of objects|particles|a structure".split("|"),
            "rotations": "None|text|1|eye (3, 3)|zeros as rotations|mirrors as rotations|"
            "rotations with NaN|rotations of text|array of objects|particles".split("|"),
            "shifts": "text|1|shifts with NaN|shifts (16, 3)|array of objects|dict".split("|"),
            "pixel_size": [*POSITIVE, "None"],
            "ctf": "text|1|True|a map|particles|array (3,)".split("|"),
            "ids": "text|1|15 ids|ids of None|ids of floats|dict|array (2, 2)|True".split("|"),
            "rows": "text|1|fractions|dict|15 ids|array of text|array of NaN".split("|"),
            "truth": "text|1|True|object|array (3,)".split("|"),
        },
    ),
    "ParticleStack[rows]": (
        lambda g, tmp: (g.particles.__getitem__, {"rows": [0, 1]}),
        {"rows": [*ROWS, "array of objects", "particles", "object", "array (3,)"]},
    ),
    "ParticleStack.read_images": (
        lambda g, tmp: (g.particles.read_images, {"rows": [0]}),
        {"rows": "None|text|2.5|99|True|[0.5]|mask of 3|dict|[[0, 1]]".split("|")},
    ),
    "ParticleStack.batches": (
        lambda g, tmp: (lambda **k: list(g.particles.batches(**k)), {}),
        {
            "batch_size": COUNT,
            "device": DEVICE,
            "seed": [name for name in SEED if name != "None"],
            "progress": "3|True|empty list|bytes".split("|"),
            "images": FLAG,
            "require_finite": FEW_FLAG,
        },
    ),
    "ParticleStack.split": (
        lambda g, tmp: (g.particles.split, {"train": 0.5}),
        {
            "train": "None|text|NaN|infinity|-0.5|1.5|True|list|complex|dict|array (3,)".split("|"),
            "validation": "text|NaN|-0.5|1.5|True|list".split("|"),
            "test": "text|NaN|-0.5|7|True".split("|"),
            "seed": SEED,
        },
    ),
    "ParticleStack.save": (
        lambda g, tmp: (g.particles.save, {"path": tmp / "b.star"}),
        {
            "path": [*PATH, "text"],
            "images": FLAG,
            "progress": "3|True|empty list".split("|"),
            "columns": "text|1|True|list|columns of text|columns of 3|columns of NaN".split("|"),
        },
    ),
    "reconstruct": (
        lambda g, tmp: (cc.reconstruct, {"particles": g.particles, "progress": False}),
        {
            "particles": [*noun("particles"), "images", "no particles"],
            "weights": "text|1|negative weights|weights with NaN|15 weights|weights of text|dict|"
            "0|array of objects|array of complex".split("|"),
            "scale": "text|1|negative weights|weights with NaN|15 weights|weights of text".split(
                "|"
            ),
            "half_maps": FLAG,
            "mask": "text|1|mask (8, 8, 8)|mask of NaN|mask of text|array (3,)|dict|True".split(
                "|"
            ),
            "origin": "text|1|array of NaN|array (2, 2)|list|dict|array of text".split("|"),
            **SETTINGS,
            "seed": SEED,
        },
    ),
    "Map.save": (lambda g, tmp: (g.map.save, {"path": tmp / "a.mrc"}), {"path": [*PATH, "text"]}),
    "simulate_particles": (
        lambda g, tmp: (
            cc.simulate_particles,
            {
                "structure": g.structure,
                "n_particles": 2,
                "conformations": g.coords[None],
                "box_size": 32,
                "progress": False,
                "device": "cpu",
            },
        ),
        {
            "structure": noun("a structure"),
            "n_particles": COUNT,
            "conformations": "None|text|1|coords|array (3,)|array of NaN|empty array|dict|"
            "array of text|array of objects|a structure|ragged list".split("|"),
            "dynamics": "text|1|a model|a structure|modes".split("|"),
            "latents": "text|1|latents (p,)|dict".split("|"),
            "box_size": "None|text|NaN|-1|0|2.5|True|list|31|10**30|1".split("|"),
            "pixel_size": POSITIVE,
            "snr_db": [*NUMBER, "-infinity", "1e300"],
            "sigma": POSITIVE,
            "ctf": "None|text|2|list|dict|NaN|array (3,)|2.5".split("|"),
            "shift_std": [*NUMBER, "infinity", "-1"],
            "seed": SEED,
            "path": "3|bytes path|NUL|long path|empty list|text|True|dict".split("|"),
            "device": DEVICE,
            "chunk_size": COUNT,
            "progress": FLAG,
        },
    ),
    "Model": (
        lambda g, tmp: (
            cc.Model,
            {"structure": g.structure, "particles": g.particles, "modes": 2},
        ),
        {
            "structure": [*noun("a structure"), "coords", "ProDy atoms"],
            "particles": [*noun("particles")[1:], "images"],
            "modes": "text|NaN|-1|2.5|True|dict|complex|10**30|array (3,)|fractions|"
            "a model|a structure".split("|"),
            "rotation": FLAG,
            "translation": FLAG,
            "sigma": POSITIVE,
            "box_size": ["1", "text"],
            "pixel_size": ["1", "text"],
        },
    ),
    "Model of a box": (
        lambda g, tmp: (
            cc.Model,
            {"structure": g.structure, "modes": None, "box_size": 32, "pixel_size": 5.0},
        ),
        {
            "box_size": "None|text|NaN|-1|0|2.5|True|31|list|10**30".split("|"),
            "pixel_size": [*POSITIVE, "None"],
        },
    ),
    "Model.decode": (
        lambda g, tmp: (g.model.decode, {"latents": g.latents}),
        {
            "latents": "None|text|1|dict|latents (p + 1)|latents of complex|a result|ragged list|"
            "latents with NaN".split("|")
        },
    ),
    "Model.render": (
        lambda g, tmp: (
            g.model.render,
            {"latents": g.latents, "rotations": g.particles.rotations},
        ),
        {
            "latents": "None|text|1|dict|latents (p + 1)|latents with NaN|a result".split("|"),
            "rotations": "None|text|1|eye (3, 3)|zeros as rotations|rotations with NaN|"
            "particles".split("|"),
            "shifts": "text|1|shifts with NaN|shifts (16, 3)".split("|"),
            "ctf": "text|1|True|array (3,)".split("|"),
        },
    ),
    "Model.to": (
        lambda g, tmp: (g.model.to, {"device": "cpu"}),
        {"device": [name for name in [*DEVICE, "None"] if name != "meta"]},
    ),
    "load_population": (
        lambda g, tmp: (cc.load_population, {"name": "glua3"}),
        {"name": [*PATH, "text", "a population"]},
    ),
    "check": (
        lambda g, tmp: (cc.check, {"model": g.model, "particles": g.particles}),
        {
            "model": noun("a model"),
            "particles": [*noun("particles"), "no particles", "images"],
            "n": COUNT,
            "device": FEW_DEVICE,
        },
    ),
    "refine": (
        lambda g, tmp: (
            cc.refine,
            {
                "model": g.model,
                "particles": g.particles,
                "population": g.population,
                "blurs": (4.0,),
                "progress": False,
                "device": "cpu",
            },
        ),
        {
            "model": [*noun("a model"), "coords"],
            "particles": [*noun("particles"), "no particles", "images"],
            "population": "text|1|dict|a model|a result|particles|True|class".split("|"),
            "start": "text|1|dict|a model|particles|latents with NaN|latents (p + 1)|"
            "latents (N - 1)|latents (p,)|True|array of text|latents of complex".split("|"),
            "blurs": "text|NaN|infinity|-1|True|empty list|dict|complex|(1, inf)|(4, -1)|(4, NaN)|"
            "(text, text)|(True,)|a result|array (2, 2)|set".split("|"),
            "n_population": COUNT,
            **SETTINGS,
            "check": FLAG,
            "seed": SEED,
            "checkpoint": "3|bytes path|NUL|long path|empty list|True|no text".split("|"),
        },
    ),
    "estimate": (
        lambda g, tmp: (
            inference.estimate,
            {
                "model": g.model,
                "particles": g.particles,
                "population": g.population,
                "progress": False,
            },
        ),
        {
            "model": noun("a model"),
            "particles": noun("particles"),
            "population": noun("a population"),
            **FEW_SETTINGS,
        },
    ),
    "Result": (
        lambda g, tmp: (cc.Result, {"model": g.model, "latents": g.latents}),
        {
            "model": noun("a model"),
            "latents": "None|text|1|dict|latents (p + 1)|latents (p,)|latents of complex|"
            "a result|ragged list|array of text|array of objects".split("|"),
            "std": "text|1|latents (p + 1)|latents (p,)|latents (N - 1)|dict|"
            "latents of complex|a result".split("|"),
            "population": "text|1|dict|a model|a result|True".split("|"),
            "particles": "text|1|dict|a model|a result|images|no particles".split("|"),
            "ids": "text|1|15 ids|ids of None|ids of floats|dict|True".split("|"),
            "scale": "text|1|negative weights|weights with NaN|15 weights|weights of text".split(
                "|"
            ),
            "noise": "text|1|15 weights|weights of text|dict".split("|"),
            "misfit": "text|1|15 weights|weights of text".split("|"),
            "responsibility": "text|1|15 weights|weights of text|dict".split("|"),
            "history": "text|1|list|True|list of text".split("|"),
            "kind": CHOICE,
            "particles_digest": "3|True|list|bytes".split("|"),
            "frame": CHOICE,
        },
    ),
    "Result[rows]": (
        lambda g, tmp: (g.result.__getitem__, {"rows": [0, 1]}),
        {"rows": [*ROWS, "object", "a result"]},
    ),
    "Result.decode": (
        lambda g, tmp: (g.result.decode, {"rows": [0]}),
        {"rows": "None|text|2.5|99|True|[0.5]|mask of 3|dict|[[0, 1]]".split("|")},
    ),
    "Result.in_frame": (
        lambda g, tmp: (g.result.in_frame, {"frame": "molecule"}),
        {"frame": CHOICE},
    ),
    "Result.save": (
        lambda g, tmp: (g.result.save, {"path": tmp / "r.safetensors"}),
        {"path": PATH},
    ),
    "load_result": (
        lambda g, tmp: (cc.load_result, {"path": saved_result(g, tmp)}),
        {
            "path": [*PATH, "text", "a result"],
            "particles": "text|1|dict|a model|a result|no particles|images|True".split("|"),
        },
    ),
    "posterior_covariance": (
        lambda g, tmp: (inference.posterior_covariance, {"result": g.result, "rows": [0]}),
        {
            "result": [*noun("a result")],
            "rows": "None|text|2.5|99|True|[0.5]|dict".split("|"),
            "device": FEW_DEVICE,
        },
    ),
    "train_encoder": (
        lambda g, tmp: (
            cc.train_encoder,
            {
                "model": g.model,
                "train": g.particles[:12],
                "validation": g.particles[12:],
                "width": 0.1,
                "epochs": 1,
                "progress": False,
                "device": "cpu",
            },
        ),
        {
            "model": noun("a model"),
            "train": [*noun("particles"), "no particles"],
            "validation": [*noun("particles"), "no particles"],
            "width": [*POSITIVE, "None"],
            "pool": [*CHOICE, "None"],
            "epochs": COUNT,
            **SETTINGS,
            "learning_rate": [*POSITIVE, "None"],
            "patience": COUNT,
            "precision": [*CHOICE, "None"],
            "seed": SEED,
            "checkpoint": "3|bytes path|NUL|long path|empty list|True".split("|"),
        },
    ),
    "encode": (
        lambda g, tmp: (cc.encode, {"encoder": g.encoder, "particles": g.particles}),
        {
            "encoder": noun("an encoder"),
            "particles": [*noun("particles"), "no particles", "images"],
            "batch_size": COUNT,
            "device": FEW_DEVICE,
        },
    ),
    "Encoder.save": (
        lambda g, tmp: (g.encoder.save, {"path": tmp / "e.safetensors"}),
        {"path": FEW_PATH},
    ),
    "load_encoder": (
        lambda g, tmp: (inference.load_encoder, {"path": saved_encoder(g, tmp)}),
        {"path": [*FEW_PATH, "text"]},
    ),
    "Population.save": (
        lambda g, tmp: (g.population.save, {"path": tmp / "p.safetensors"}),
        {"path": FEW_PATH},
    ),
    "score": (
        lambda g, tmp: (cc.score, {"result": g.result}),
        {
            "result": [*noun("a result"), "no result"],
            "motions": "text|1|a model|a result|True|dict".split("|"),
            "frame": CHOICE,
        },
    ),
    "information_limit": (
        lambda g, tmp: (cc.information_limit, {"model": g.model, "particles": g.particles}),
        {
            "model": noun("a model"),
            "particles": [*noun("particles"), "no particles"],
            "population": "text|1|a model|a result|dict".split("|"),
            "latents": LATENTS,
            "frame": CHOICE,
            "device": FEW_DEVICE,
        },
    ),
    "compute_pca": (
        lambda g, tmp: (cc.compute_pca, {"result": g.result}),
        {
            "result": [*noun("a result"), "no result"],
            "chain": [name for name in CHOICE if name != "text"] + ["text"],
            "kind": [*CHOICE, "None"],
            "n_components": COUNT,
            "frame": CHOICE,
        },
    ),
    "latent_table": (
        lambda g, tmp: (cc.latent_table, {"result": g.result}),
        {"result": noun("a result"), "frame": CHOICE},
    ),
    "describe_motion": (
        lambda g, tmp: (cc.describe_motion, {"motions": g.motions}),
        {"motions": noun("motions"), "component": COMPONENT, "percentiles": PERCENTILES},
    ),
    "motion_sentence": (
        lambda g, tmp: (cc.motion_sentence, {"motions": g.motions}),
        {"motions": noun("motions"), "component": COMPONENT, "percentiles": PERCENTILES},
    ),
    "PrincipalMotions.traverse": (
        lambda g, tmp: (g.motions.traverse, {}),
        {"component": COMPONENT, "n": COUNT, "percentiles": PERCENTILES},
    ),
    "PrincipalMotions.transform": (
        lambda g, tmp: (g.motions.transform, {"other": g.latents}),
        {"other": [name for name in DECODED if name != "a result"] + ["None", "a model"]},
    ),
    "compare_with_map": (
        lambda g, tmp: (cc.compare_with_map, {"result": g.result, "progress": False}),
        {
            "result": noun("a result"),
            "rows": "text|2.5|99|True|[0.5]|mask of 3|dict".split("|"),
            "images": "text|1|a result|a model|no particles|images".split("|"),
            "other": "text|1|latents with NaN|latents (p + 1)|dict|array of text".split("|"),
            "names": "text|1|(5,)|None|list|dict".split("|"),
            "seed": SEED,
            "device": FEW_DEVICE,
            "progress": FEW_FLAG,
        },
    ),
    "compare_ends": (
        lambda g, tmp: (cc.compare_ends, {"motions": g.motions, "images": g.particles}),
        {
            "motions": noun("motions"),
            "component": COMPONENT,
            "share": "None|text|NaN|0|-0.5|1.5|True|list|complex".split("|"),
            "images": "text|1|a result|no particles|True".split("|"),
            "seed": FEW_SEED,
            "device": FEW_DEVICE,
            "progress": FEW_FLAG,
        },
    ),
    "compare_halves": (
        lambda g, tmp: (analysis.compare_halves, {"result": g.result, "blurs": (4.0,)}),
        {
            "result": noun("a result"),
            "chain": "2|True|list|text".split("|"),
            "kind": ["text", "2", "None"],
            "n_components": FEW_COUNT,
            "n_particles": FEW_COUNT,
            "seed": FEW_SEED,
        },
    ),
    "split_noise": (
        lambda g, tmp: (analysis.split_noise, {"result": g.result, "blurs": (4.0,)}),
        {"result": noun("a result"), "n_particles": FEW_COUNT, "seed": FEW_SEED},
    ),
    "save_motion": (
        lambda g, tmp: (cc.save_motion, {"path": tmp / "m.pdb", "motions": g.motions, "n": 2}),
        {
            "path": [*PATH, "text"],
            "motions": noun("motions"),
            "component": COMPONENT,
            "n": COUNT,
            "percentiles": PERCENTILES,
            "fps": FEW_COUNT,
            "resolution": POSITIVE,
        },
    ),
    "save_motion as densities": (
        lambda g, tmp: (cc.save_motion, {"path": tmp / "m.mrc", "motions": g.motions, "n": 1}),
        {"resolution": POSITIVE},
    ),
    "save_motion as a movie": (
        lambda g, tmp: (cc.save_motion, {"path": tmp / "m.gif", "motions": g.motions, "n": 2}),
        {"fps": COUNT},
    ),
    "save_conformations": (
        lambda g, tmp: (
            analysis.save_conformations,
            {"path": tmp / "c.pdb", "model": g.model, "latents": g.latents[:1]},
        ),
        {"path": [*FEW_PATH, "text"], "model": noun("a model"), "latents": DECODED},
    ),
    "save_densities": (
        lambda g, tmp: (
            analysis.save_densities,
            {"path": tmp / "c.mrc", "model": g.model, "latents": g.latents[:1]},
        ),
        {"path": FEW_PATH, "model": ["None", "text", "a structure"], "resolution": POSITIVE},
    ),
    "save_selection": (
        lambda g, tmp: (
            analysis.save_selection,
            {"folder": tmp, "motions": g.motions, "rows": [0]},
        ),
        {
            "folder": FEW_PATH,
            "motions": noun("motions"),
            "rows": "None|text|2.5|99|True|[0.5]|mask of 3|dict".split("|"),
        },
    ),
    "explore": (
        lambda g, tmp: (cc.explore, {"result": g.result}),
        {
            "result": noun("a result"),
            "columns": "text|1|list|table of text|table of 3 rows|True".split("|"),
            "n_components": COUNT,
            "frame": CHOICE,
        },
    ),
    "view_structure": (
        lambda g, tmp: (cc.view_structure, {"structure": g.structure}),
        {"structure": [*noun("a structure"), "ProDy atoms", "coords"]},
    ),
    "view_modes": (
        lambda g, tmp: (cc.view_modes, {"structure": g.structure, "modes": g.modes}),
        {
            "structure": noun("a structure"),
            "modes": noun("modes"),
            "chain": "2|True|list|text|dict".split("|"),
            "mode": COMPONENT,
            "amplitude": [*POSITIVE, "None"],
        },
    ),
    "plot_particles": (
        lambda g, tmp: (cc.plots.plot_particles, {"result": g.result, "n": 2}),
        {"result": noun("a result"), "n": FEW_COUNT},
    ),
    "plot_refinement": (
        lambda g, tmp: (cc.plots.plot_refinement, {"result": g.result}),
        {"result": noun("a result")},
    ),
    "plot_latent_space": (
        lambda g, tmp: (cc.plots.plot_latent_space, {"motions": g.motions}),
        {
            "motions": noun("motions"),
            "scores": "text|1|dict|array (3,)|a result".split("|"),
            "truth": "text|1|dict|15 weights|weights of text".split("|"),
            "title": "1|empty list|True".split("|"),
        },
    ),
    "plot_conformations": (
        lambda g, tmp: (cc.plots.plot_conformations, {"motions": g.motions}),
        {
            "motions": noun("motions"),
            "component": COMPONENT,
            "n": FEW_COUNT,
            "percentiles": PERCENTILES,
        },
    ),
    "plot_structure": (
        lambda g, tmp: (cc.plots.plot_structure, {"structure": g.structure}),
        {"structure": noun("a structure")},
    ),
    "plot_modes": (
        lambda g, tmp: (cc.plots.plot_modes, {"structure": g.structure, "modes": g.modes}),
        {"modes": noun("modes"), "mode": COMPONENT},
    ),
    "plot_training": (
        lambda g, tmp: (cc.plots.plot_training, {"encoder": g.encoder}),
        {"encoder": noun("an encoder")},
    ),
    "plot_residue_motion": (
        lambda g, tmp: (
            cc.plots.plot_residue_motion,
            {"model": g.model, "latents": g.latents},
        ),
        {"model": noun("a model"), "latents": DECODED},
    ),
    "plot_rmsd": (
        lambda g, tmp: (
            cc.plots.plot_rmsd,
            {"per_particle": {"a": np.ones(3)}, "mean": np.ones(3)},
        ),
        {
            "per_particle": "None|text|1|columns of text|columns of NaN|a result".split("|"),
            "mean": "None|text|weights with NaN|weights of text|dict".split("|"),
        },
    ),
    "plot_map_comparison": (
        lambda g, tmp: (cc.plots.plot_map_comparison, {}),
        {"comparison": ["None", "text", "1", "a map", "a result", "dict"]},
    ),
    "plot_halves": (
        lambda g, tmp: (cc.plots.plot_halves, {}),
        {"comparison": ["None", "text", "1", "a map", "a result", "dict"]},
    ),
    "plot_check": (
        lambda g, tmp: (cc.plots.plot_check, {}),
        {"check": ["None", "text", "1", "a map", "a result", "dict", "function"]},
    ),
    "decode_ensemble": (
        lambda g, tmp: (analysis.decode_ensemble, {"model": g.model, "latents": g.latents[:1]}),
        {"model": noun("a model"), "latents": [*DECODED, "latents (0, p)"]},
    ),
    "density_table": (
        lambda g, tmp: (analysis.density_table, {"result": g.result}),
        {"result": noun("a result")},
    ),
    "bending_table": (
        lambda g, tmp: (analysis.bending_table, {"result": g.result}),
        {"result": noun("a result")},
    ),
    "average_covariance": (
        lambda g, tmp: (analysis.average_covariance, {"result": g.result}),
        {"result": noun("a result"), "n": COUNT},
    ),
    "particle_columns": (
        lambda g, tmp: (analysis.particle_columns, {"result": g.result}),
        {
            "result": noun("a result"),
            "others": "text|1|table of text|table of 3 rows|dict".split("|"),
        },
    ),
    "screw_motion": (
        lambda g, tmp: (molecule.screw_motion, {"before": g.coords, "after": g.coords}),
        {
            "before": "None|text|1|imaging coords with NaN|one atom fewer|array of text".split("|"),
            "after": "None|text|1|imaging coords with NaN|one atom fewer|array of text".split("|"),
        },
    ),
    "find_chain": (
        lambda g, tmp: (molecule.find_chain, {"structure": g.structure, "modes": g.modes}),
        {"structure": noun("a structure"), "chain": ["2", "True", "text"], "mode": COMPONENT},
    ),
    "write_structure": (
        lambda g, tmp: (
            molecule.write_structure,
            {"atoms": g.structure.atoms, "title": "a", "path": tmp / "w.pdb"},
        ),
        {
            "atoms": [*noun("ProDy atoms"), "coords"],
            "title": ["None", "2", "bytes"],
            "path": [*PATH, "text"],
        },
    ),
    "open_source": (
        lambda g, tmp: (images.open_source, {"source": {"star": str(saved_star(g, tmp))}}),
        {"source": "None|text|1|dict|list|a result".split("|"), "path": ["3", "NUL", "bytes path"]},
    ),
    "rmsd": (
        lambda g, tmp: (
            inference.rmsd,
            {"coords": torch.ones(1, 4, 3), "truth": torch.ones(1, 4, 3)},
        ),
        {"coords": "None|text|1|coords|a result".split("|"), "truth": ["None", "text", "coords"]},
    ),
    "true_latents": (
        lambda g, tmp: (
            inference.true_latents,
            {"model": g.model, "particles": g.particles},
        ),
        {"model": noun("a model"), "particles": [*noun("particles"), "no particles"]},
    ),
    "true_population": (
        lambda g, tmp: (
            inference.true_population,
            {"model": g.model, "particles": g.particles},
        ),
        {"model": noun("a model"), "particles": noun("particles"), "latents": LATENTS},
    ),
    "chain_names": (
        lambda g, tmp: (molecule.chain_names, {"atoms": g.structure.atoms}),
        {"atoms": noun()},
    ),
    "change_sentence": (
        lambda g, tmp: (molecule.change_sentence, {"table": cc.describe_motion(g.motions)}),
        {"table": noun()},
    ),
    "atom_beads": (
        lambda g, tmp: (molecule.atom_beads, {"structure": g.structure}),
        {"structure": noun("a structure"), "width": POSITIVE},
    ),
    "residue_beads": (
        lambda g, tmp: (molecule.residue_beads, {"structure": g.structure}),
        {"structure": noun("a structure")},
    ),
    "random_rotations": (
        lambda g, tmp: (images.random_rotations, {"n": 2, "seed": 0}),
        {"n": COUNT, "seed": SEED},
    ),
    "compute_fsc": (
        lambda g, tmp: (images.compute_fsc, {"a": np.ones((8, 8, 8)), "b": np.ones((8, 8, 8))}),
        {
            "a": "None|text|1|array (3,)|mask of NaN|mask of text|a map".split("|"),
            "b": "None|text|1|array (3,)|mask of NaN|mask of text|a map".split("|"),
        },
    ),
    "write_volume": (
        lambda g, tmp: (
            images.write_volume,
            {
                "path": tmp / "v.mrc",
                "volume": np.ones((8, 8, 8)),
                "pixel_size": 2.0,
                "corner": (0, 0, 0),
            },
        ),
        {
            "path": FEW_PATH,
            "volume": "None|text|1|array (3,)|mask of NaN|mask of text|a map".split("|"),
            "pixel_size": [*POSITIVE, "None"],
            "corner": ["None", "text", "1", "list", "array of NaN"],
        },
    ),
    "measure_bending": (
        lambda g, tmp: (
            inference.measure_bending,
            {"model": g.model, "latents": g.latents, "domains": None},
        ),
        {"model": noun("a model"), "latents": DECODED, "domains": ["text", "1", "a model"]},
    ),
    "correct_reference": (
        lambda g, tmp: (inference.correct_reference, {"result": g.result}),
        {"result": noun("a result"), "n_particles": COUNT, "device": FEW_DEVICE},
    ),
}


def change_of(g):
    return {"structure": g.structure, "before": g.structure.coords, "after": g.opened.coords}


def stack_of(g):
    return {
        "images": g.particles.read_images(),
        "rotations": g.particles.rotations,
        "pixel_size": 2.0,
    }


def saved_star(g, folder):
    path = folder / "a.star"
    if not path.exists():
        g.particles.save(path)
    return path


def saved_result(g, folder):
    path = folder / "r.safetensors"
    if not path.exists():
        g.result.save(path)
    return path


def saved_encoder(g, folder):
    path = folder / "e.safetensors"
    if not path.exists():
        g.encoder.save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("boundary")


def stop(*_):
    raise TimeoutError


def outcome(call) -> str:
    """ "refused" in one sentence, "silent", or "foreign" and what was raised instead."""
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        with warnings.catch_warnings(action="ignore"):
            # What is accepted may fail only once it is looked at.
            value = repr(call())
    except OURS as error:
        sentence = str(error)
        if "\n" in sentence or not re.match(r"expected .*\b(got|found)\b.*; .*\btry\b", sentence):
            return f"foreign: {type(error).__name__}: {sentence[:300]}"
        return "refused"
    except TimeoutError:
        return "hangs"
    except Exception as error:
        return f"foreign: {type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.alarm(0)
    return f"silent: {value[:200]}"


def wrong_cases():
    for name, (_, arguments) in WRONG.items():
        for argument, values in arguments.items():
            for value in dict.fromkeys(values):
                yield pytest.param(name, argument, value, id=f"{name}, {argument}: {value}")


CASES = list(wrong_cases())


@pytest.mark.parametrize(("name", "argument", "value"), CASES)
def test_wrong_arguments_are_refused_in_one_sentence(folder, name, argument, value):
    g = things()
    function, good = WRONG[name][0](g, folder)
    wrong = MADE[value](g) if value in MADE else VALUES[value]
    assert outcome(lambda: function(**{**good, argument: wrong})) == "refused"


# Unusual values that are valid: what is called, and what has to hold of what it returns.
VALID = {
    "a count of numpy": (lambda g, tmp: cc.morph(g.structure, g.opened, np.int64(3)), 3),
    "a count of torch": (lambda g, tmp: cc.morph(g.structure, g.opened, torch.tensor(3)), 3),
    "a count in an array": (lambda g, tmp: cc.morph(g.structure, g.opened, np.array(3)), 3),
    "modes one a chain": (lambda g, tmp: cc.compute_modes(g.structure, (1, 2)).vectors, 2),
    "modes in an array": (
        lambda g, tmp: cc.compute_modes(g.structure, np.array([1, 2])).vectors,
        2,
    ),
    "no modes": (lambda g, tmp: cc.compute_modes(g.structure, 0).vectors, 2),
    "a cutoff of numpy": (
        lambda g, tmp: cc.compute_modes(g.structure, 1, np.float32(15.0)).vectors,
        2,
    ),
    "a whole cutoff": (lambda g, tmp: cc.compute_modes(g.structure, 1, 15).vectors, 2),
    "coords as a list": (
        lambda g, tmp: g.structure.with_coords(g.all_coords.tolist()).chain_ids,
        2,
    ),
    "coords as a tensor": (
        lambda g, tmp: g.structure.with_coords(torch.from_numpy(g.all_coords)).chain_ids,
        2,
    ),
    "an origin as a tensor": (lambda g, tmp: g.structure.with_origin(torch.zeros(3)).origin, 3),
    "an origin of integers": (lambda g, tmp: g.structure.with_origin((0, 1, 2)).origin, 3),
    "chains as a tuple": (lambda g, tmp: cc.load_structure("glua3-open", ("A",)).chain_ids, 1),
    "chains in an array": (
        lambda g, tmp: cc.load_structure("glua3-open", np.array(["A", "B"])).chain_ids,
        2,
    ),
    "bodies None": (lambda g, tmp: cc.load_structure("glua3-open", bodies=None).chain_ids, 2),
    "ProDy atoms": (lambda g, tmp: cc.load_structure(g.structure.atoms).chain_ids, 2),
    "a ProDy selection": (
        lambda g, tmp: cc.load_structure(g.structure.atoms.select("chain A")).chain_ids,
        1,
    ),
    "no bodies that turn": (lambda g, tmp: g.structure.with_turning().turning, 0),
    "a path as text": (lambda g, tmp: cc.load_particles(str(saved_star(g, tmp))), 16),
    "a path as a Path": (lambda g, tmp: cc.load_particles(Path(saved_star(g, tmp))), 16),
    "True of numpy": (lambda g, tmp: cc.load_particles(saved_star(g, tmp), np.bool_(True)), 16),
    "a pixel size of numpy": (
        lambda g, tmp: cc.load_particles(saved_star(g, tmp), pixel_size=np.float64(3.88)),
        16,
    ),
    "a box of numpy": (
        lambda g, tmp: cc.load_particles(saved_star(g, tmp), box_size=np.int32(16)),
        16,
    ),
    "no spherical aberration": (
        lambda g, tmp: cc.load_particles(saved_star(g, tmp), spherical_aberration_mm=0),
        16,
    ),
    "an optics group by number": (
        lambda g, tmp: cc.load_particles(saved_star(g, tmp), optics_group=1),
        16,
    ),
    "rows: one": (lambda g, tmp: g.particles[3], 1),
    "rows: one of numpy": (lambda g, tmp: g.particles[np.int64(3)], 1),
    "rows: one tensor": (lambda g, tmp: g.particles[torch.tensor(3)], 1),
    "rows: from the end": (lambda g, tmp: g.particles[-1], 1),
    "rows: none": (lambda g, tmp: g.particles[[]], 0),
    "rows: no row of an array": (lambda g, tmp: g.particles[np.array([])], 0),
    "rows: twice the same": (lambda g, tmp: g.particles[[1, 1]], 2),
    "rows: a range": (lambda g, tmp: g.particles[range(3)], 3),
    "rows: a tuple": (lambda g, tmp: g.particles[(0, 1)], 2),
    "rows: a slice": (lambda g, tmp: g.particles[::4], 4),
    "rows: a mask": (lambda g, tmp: g.particles[np.arange(16) < 3], 3),
    "rows: a mask as a list": (lambda g, tmp: g.particles[[True] * 2 + [False] * 14], 2),
    "rows: a mask tensor": (lambda g, tmp: g.result[torch.arange(16) < 3], 3),
    "a batch of one": (lambda g, tmp: list(g.particles.batches(1)), 16),
    "a batch larger than all": (lambda g, tmp: list(g.particles.batches(10**6)), 1),
    "a batch of numpy": (lambda g, tmp: list(g.particles.batches(np.int64(8))), 2),
    "a device": (lambda g, tmp: list(g.particles.batches(16, device=torch.device("cpu"))), 1),
    "images as a list": (
        lambda g, tmp: cc.ParticleStack(
            g.particles.read_images().tolist(), g.particles.rotations, pixel_size=2
        ),
        16,
    ),
    "images of integers": (
        lambda g, tmp: cc.ParticleStack(
            np.ones((16, 32, 32), dtype=np.uint8), g.particles.rotations, pixel_size=2
        ),
        16,
    ),
    "images with NaN": (
        lambda g, tmp: cc.ParticleStack(
            np.full((16, 32, 32), math.nan), g.particles.rotations, pixel_size=2
        ),
        16,
    ),
    "a share of everything": (lambda g, tmp: g.particles.split(1, 0, 0)[0], 16),
    "columns as a table": (lambda g, tmp: saved_with_columns(g, tmp), 16),
    "a mask of True": (
        lambda g, tmp: (
            cc.reconstruct(
                g.particles, mask=np.ones((32, 32, 32), dtype=bool), progress=False
            ).volume
        ),
        32,
    ),
    "weights of True": (
        lambda g, tmp: (
            cc.reconstruct(g.particles, weights=np.ones(16, dtype=bool), progress=False).volume
        ),
        32,
    ),
    "no noise": (lambda g, tmp: two_particles(g, snr_db=math.inf), 2),
    "whole dB": (lambda g, tmp: two_particles(g, snr_db=-10), 2),
    "a seed of numpy": (lambda g, tmp: two_particles(g, seed=np.uint32(7)), 2),
    "the largest seed": (lambda g, tmp: two_particles(g, seed=2**63 - 1), 2),
    "a CTF that is changed": (lambda g, tmp: two_particles(g, ctf={"voltage_kv": 200}), 2),
    "no CTF": (lambda g, tmp: two_particles(g, ctf=False), 2),
    "one blur": (lambda g, tmp: refined_again(g, blurs=4.0), 16),
    "a whole blur": (lambda g, tmp: refined_again(g, blurs=4), 16),
    "blurs in an array": (lambda g, tmp: refined_again(g, blurs=np.array([4.0])), 16),
    "start as an array": (lambda g, tmp: refined_again(g, blurs=4.0, start=g.latents.numpy()), 16),
    "start as a result": (lambda g, tmp: refined_again(g, blurs=4.0, start=g.result), 16),
    "latents as a list": (lambda g, tmp: cc.Result(g.model, g.latents.tolist()), 16),
    "latents as an array": (lambda g, tmp: cc.Result(g.model, g.latents.numpy()), 16),
    "latents with NaN": (
        lambda g, tmp: cc.Result(g.model, torch.full_like(g.latents, math.nan)),
        16,
    ),
    "ids of numpy": (lambda g, tmp: cc.Result(g.model, g.latents, ids=np.arange(16)), 16),
    "decoded from an array": (lambda g, tmp: g.model.decode(g.latents.numpy()), 16),
    "decoded, one": (lambda g, tmp: g.model.decode(g.latents[0]), len("x") * 731),
    "all components": (lambda g, tmp: cc.compute_pca(g.result, n_components=10**6).components, 12),
    "percentiles as a list": (
        lambda g, tmp: g.motions.traverse(0, 2, [5, 95]),
        2,
    ),
    "percentiles in an array": (
        lambda g, tmp: g.motions.traverse(0, 2, np.array([0, 100])),
        2,
    ),
    "a component of numpy": (lambda g, tmp: g.motions.traverse(np.int64(0), 2), 2),
    "scores of a tensor": (lambda g, tmp: g.motions.transform(g.latents[:3]), 3),
    "other columns": (
        lambda g, tmp: analysis.particle_columns(
            g.result, __import__("pandas").DataFrame({"a": range(16)})
        ),
        16,
    ),
}


def two_particles(g, **more):
    quiet = {"progress": False, "device": "cpu", "box_size": 32}
    return cc.simulate_particles(g.structure, 2, conformations=g.coords[None], **quiet, **more)


def refined_again(g, **more):
    quiet = {"progress": False, "device": "cpu", "check": False}
    return cc.refine(g.model, g.particles, g.population, **quiet, **more)


def saved_with_columns(g, folder):
    table = __import__("pandas").DataFrame({"PC1 (Å)": np.arange(16.0)})
    g.particles.save(folder / "columns.star", columns=table)
    return cc.load_particles(folder / "columns.star").columns["cryochainsPC1"]


@pytest.mark.parametrize("name", VALID)
def test_unusual_arguments_that_are_valid(folder, name):
    call, length = VALID[name]
    assert len(call(things(), folder)) == length


def test_the_signature_and_the_docstring_are_those_of_the_function():
    import inspect

    for name in cc.__all__:
        function = getattr(cc, name)
        if inspect.isfunction(function):
            assert function.__doc__ and function.__name__ == name
            assert "args" not in inspect.signature(function).parameters
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'b'"):
        cc.morph(things().structure)
    with pytest.raises(TypeError, match="unexpected keyword argument 'frames'"):
        cc.morph(things().structure, things().opened, frames=3)


# Files: what opens each, and what writes a whole one.
FILES = {
    "a.pdb": (cc.load_structure, lambda g, path: g.structure.save(path)),
    "a.pdb.gz": (cc.load_structure, lambda g, path: g.structure.save(path)),
    "a.cif": (cc.load_structure, lambda g, path: g.structure.save(path)),
    "a.cif.gz": (cc.load_structure, lambda g, path: g.structure.save(path)),
    "a.star": (cc.load_particles, lambda g, path: g.particles.save(path)),
    "a.cs": (cc.load_particles, lambda g, path: write_cs(g, path)),
    "a.mrcs": (
        lambda path: cc.load_particles(path.with_suffix(".star")).read_images(),
        lambda g, path: g.particles.save(path.with_suffix(".star")),
    ),
    "result.safetensors": (cc.load_result, lambda g, path: g.result.save(path)),
    "population.safetensors": (cc.load_population, lambda g, path: g.population.save(path)),
    "encoder.safetensors": (inference.load_encoder, lambda g, path: g.encoder.save(path)),
    "block1.safetensors": (
        lambda path: refined_again(things(), blurs=4.0, checkpoint=path.parent),
        lambda g, path: refined_again(g, blurs=4.0, checkpoint=path.parent),
    ),
}
DAMAGES = {
    "empty": lambda data: b"",
    "one byte": lambda data: b"\x00",
    "text": lambda data: b"Dear reviewer,\nplease find the structure attached.\n",
    "a web page": lambda data: b"<!DOCTYPE html><html><body>404</body></html>",
    "a picture": lambda data: b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8,
    "random bytes": lambda data: np.random.default_rng(0).bytes(5000),
    "zeros": lambda data: bytes(5000),
    "UTF-16": lambda data: data[:2000].decode("latin-1").encode("utf-16"),
    "compressed": lambda data: gzip.compress(data),
    "compressed nothing": lambda data: gzip.compress(b""),
    "its first tenth": lambda data: data[: len(data) // 10],
    "its first half": lambda data: data[: len(data) // 2],
    "without its end": lambda data: data[:-3],
    "without its beginning": lambda data: data[100:],
    "twice": lambda data: data + data,
    "reversed": lambda data: data[::-1],
    "zeros in the middle": lambda data: data[:300] + bytes(200) + data[500:],
    "its lines sorted": lambda data: b"\n".join(sorted(data.split(b"\n"))),
    "its numbers as nan": lambda data: re.sub(rb"-?\d+\.\d+", b"nan", data),
    "its numbers as words": lambda data: re.sub(rb"\d+\.\d+", b"words", data),
    "a pickle": lambda data: b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.",
}
# What is left of these can be read, and is: fewer atoms or rows, or the first of two copies.
READABLE = {
    "a.pdb": (
        "its first tenth",
        "its first half",
        "without its end",
        "without its beginning",
        "twice",
        "its lines sorted",
    ),
    "a.pdb.gz": ("twice",),
    "a.cif": ("its first tenth", "its first half", "without its end", "twice"),
    "a.cif.gz": ("twice",),
    "a.star": ("its first half", "without its end", "twice"),
    "a.cs": ("twice",),
    # Labels of the header are not read; stacks may be compressed.
    "a.mrcs": ("compressed", "twice", "zeros in the middle"),
}


def write_cs(g, path):
    stack = path.with_name("of-cs.mrcs")
    if not stack.exists():
        g.particles.save(stack.with_suffix(".star"))
    kinds = [("uid", "u8"), ("blob/path", "S12"), ("blob/idx", "u4"), ("blob/shape", "u4", 2)]
    kinds += [("blob/psize_A", "f4"), ("blob/sign", "f4"), ("alignments3D/pose", "f4", 3)]
    kinds += [("alignments3D/shift", "f4", 2), ("alignments3D/psize_A", "f4")]
    array = np.ones(16, dtype=kinds)
    array["blob/path"], array["blob/idx"], array["blob/shape"] = b"of-cs.mrcs", range(16), 32
    array["blob/psize_A"] = g.particles.pixel_size
    with path.open("wb") as file:
        np.save(file, array)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Name → bytes of a whole file of each kind."""
    g, at = things(), tmp_path_factory.mktemp("whole")
    kept = {}
    for name, (_, write) in FILES.items():
        write(g, at / name)
        kept[name] = (at / name).read_bytes()
    return kept


def damaged_cases():
    for name in FILES:
        for damage in DAMAGES:
            yield pytest.param(name, damage, id=f"{name}: {damage}")


DAMAGED = list(damaged_cases())


@pytest.mark.parametrize(("name", "damage"), DAMAGED)
def test_damaged_files_are_refused_in_one_sentence(tmp_path, whole, name, damage):
    opened, write = FILES[name]
    path = tmp_path / name
    if path.suffix in (".star", ".cs", ".mrcs"):
        write(things(), path)  # and what stands beside it
    data = DAMAGES[damage](whole[name])
    if data == whole[name]:
        pytest.skip("there is nothing to damage")
    path.write_bytes(data)
    seen = outcome(lambda: opened(path))
    if damage in READABLE.get(name, ()):
        assert seen.startswith(("refused", "silent: Structure", "silent: Part", "silent: tensor"))
    else:
        assert seen == "refused"


@pytest.mark.parametrize("name", FILES)
def test_folders_in_place_of_files(tmp_path, name):
    opened, write = FILES[name]
    path = tmp_path / name
    write(things(), path)
    path.unlink()
    path.mkdir()
    assert outcome(lambda: opened(path)) == "refused"


@pytest.mark.parametrize("name", FILES)
def test_files_that_may_not_be_read(tmp_path, name):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    opened, write = FILES[name]
    path = tmp_path / name
    write(things(), path)
    path.chmod(0)
    assert outcome(lambda: opened(path)) == "refused"


@pytest.mark.parametrize("name", [name for name in FILES if name != "block1.safetensors"])
def test_files_that_are_not_there(tmp_path, name):
    path = tmp_path / "elsewhere" / name
    assert outcome(lambda: FILES[name][0](path)) == "refused"


# Parts of a description in a safetensors file, replaced by these.
PARTS = (None, 3, -1.5, True, "word", [], ["word"], {}, {"a": 1}, 10**30)


def keys_of(meta, above=()):
    """Every key of a description, and of those within it."""
    for key, value in meta.items():
        yield (*above, key)
        if isinstance(value, dict) and len(above) < 2 and key != "fingerprint":
            yield from keys_of(value, (*above, key))


@pytest.mark.parametrize("name", ["result", "population", "encoder"])
def test_descriptions_with_a_wrong_part(tmp_path, name):
    """Each part of the JSON replaced: refused, or no other than a sane answer comes of it."""
    opened, write = FILES[f"{name}.safetensors"]
    path = tmp_path / f"{name}.safetensors"
    write(things(), path)
    tensors, meta = load_tensors(path, name)
    bad = []
    for keys in list(keys_of(meta)):
        for part in PARTS:
            changed = json.loads(json.dumps(meta))
            inner = changed
            for key in keys[:-1]:
                inner = inner[key]
            inner[keys[-1]] = part
            save_tensors(path, tensors, changed)
            seen = outcome(lambda: opened(path))
            if seen.startswith(("foreign", "hangs")):
                bad.append(f"{keys}: {part!r}: {seen}")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("name", ["result", "population", "encoder"])
def test_tensors_that_are_missing_or_wrong(tmp_path, name):
    opened, write = FILES[f"{name}.safetensors"]
    path = tmp_path / f"{name}.safetensors"
    write(things(), path)
    tensors, meta = load_tensors(path, name)
    changes = {
        "missing": lambda one: None,
        "empty": lambda one: one[:0],
        "of another shape": lambda one: one[..., None],
        "shorter": lambda one: one[:-1],
        "not finite": lambda one: one * math.nan if one.is_floating_point() else one - 2**30,
        "of another type": lambda one: one.to(torch.float16),
        "negative": lambda one: -one.abs() if one.is_floating_point() else -one.long() - 1,
    }
    bad = []
    for key in list(tensors)[: 8 if name == "encoder" else 40]:
        for words, change in changes.items():
            other = change(tensors[key])
            changed = {k: v for k, v in tensors.items() if k != key}
            if other is not None:
                changed[key] = other
            save_tensors(path, changed, meta)
            seen = outcome(lambda: opened(path))
            if seen.startswith(("foreign", "hangs")):
                bad.append(f"{key} {words}: {seen}")
    assert not bad, "\n".join(bad)


# What a table may call its images that are none; "{}" is a folder with a file that is no stack.
NO_STACKS = (
    "/etc/passwd",
    "/dev/zero",
    "/dev/random",
    "/dev/stdin",
    "/proc/self/environ",
    "/proc/self/mem",
    "../../../../../../../../etc/passwd",
    "file:///etc/passwd",
    "http://127.0.0.1:9/a.mrcs",
    "https://127.0.0.1:9/a.mrcs",
    "ftp://127.0.0.1:9/a.mrcs",
    "//127.0.0.1/share/a.mrcs",
    "~/a.mrcs",
    "$HOME/a.mrcs",
    "{}",
    "{}/notes.txt",
    "{}/pipe",
    "{}/zero",
    "|cat",
    "a" * 5000,
)


@pytest.fixture
def no_network(monkeypatch):
    """Whoever opens a connection fails."""

    def connect(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.setattr("socket.create_connection", connect)


@pytest.mark.parametrize("suffix", [".star", ".cs"])
@pytest.mark.parametrize("name", NO_STACKS)
def test_a_table_opens_no_file_that_is_no_stack(tmp_path, no_network, name, suffix):
    (tmp_path / "notes.txt").write_text("private\n" * 500)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    name = name.format(tmp_path)
    path = tmp_path / f"a{suffix}"
    if suffix == ".star":
        cc_particles = things().particles
        cc_particles.save(path)
        path.write_text(path.read_text().replace("@a.mrcs", f"@{name}"))
    else:
        array = np.ones(3, dtype=[("blob/path", f"S{len(name)}"), ("blob/idx", "u4")])
        array["blob/path"] = name.encode()
        with path.open("wb") as file:
            np.save(file, array)
    assert outcome(lambda: cc.load_particles(path).read_images()) == "refused"


@pytest.mark.parametrize("where", ["absolute", "project", "above"])
def test_stacks_by_the_names_that_programs_give_them_are_opened(tmp_path, where):
    project = tmp_path / "project"
    (project / "Extract" / "job002").mkdir(parents=True)
    (project / "Refine3D" / "job003").mkdir(parents=True)
    things().particles.save(project / "Extract" / "job002" / "a.star")
    text = (project / "Extract" / "job002" / "a.star").read_text()
    name = {
        "absolute": f"{project}/Extract/job002/a.mrcs",
        "project": "Extract/job002/a.mrcs",
        "above": "../../Extract/job002/a.mrcs",
    }[where]
    table = project / "Refine3D" / "job003" / "run_data.star"
    table.write_text(text.replace("@a.mrcs", f"@{name}"))
    with warnings.catch_warnings(action="ignore"):
        assert cc.load_particles(table).read_images().shape == (16, 32, 32)


def test_a_cs_of_python_objects_runs_nothing(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "made"),))

    for array in (
        np.array([Harmful()], dtype=object),
        np.array([(Harmful(), 0)], dtype=[("blob/path", "O"), ("blob/idx", "u4")]),
    ):
        with (tmp_path / "a.cs").open("wb") as file:
            np.save(file, array, allow_pickle=True)
        assert outcome(lambda: cc.load_particles(tmp_path / "a.cs")) == "refused"
    assert not (tmp_path / "made").exists()


# What a result may say of where its particles came from.
SOURCES = {
    "no table": {"star": "/etc/passwd", "relative": "../../../../../etc/passwd"},
    "a device": {"star": "/dev/zero", "relative": "/dev/zero"},
    "a device by the name of a table": {"star": "{}/zero.star", "relative": "zero.star"},
    "a pipe": {"star": "{}/pipe.star", "relative": "pipe.star"},
    "a folder": {"star": "{}", "relative": "."},
    "an address": {"star": "https://127.0.0.1:9/a.star", "relative": "https://127.0.0.1:9/a.star"},
    "another table": {"star": "{}/other.star", "relative": "other.star"},
    "a table with a secret": {"star": "{}/secret.star", "relative": "secret.star"},
    "a table of nothing": {"star": "", "relative": ""},
    "a NUL": {"star": "a\0b", "relative": "a\0b"},
    "a number": {"star": 3, "relative": 3},
    "no path": {"relative": "a.star"},
    "no relative path": {"star": "a.star"},
    "an unknown argument": {"star": "{}/a.star", "relative": "a.star", "device": "cpu"},
    "a passthrough": {"star": "{}/a.star", "relative": "a.star", "passthrough": ["/etc/passwd"]},
    "a folder of data": {"star": "{}/a.star", "relative": "a.star", "datadir": 3},
    "text": "a.star",
    "a list": ["a.star"],
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_result_opens_nothing_but_its_own_particles(tmp_path, no_network, name):
    """Whatever its file says of where they are: it opens without them, or is refused."""
    g = things()
    g.particles.save(tmp_path / "a.star")
    other = cc.load_particles(tmp_path / "a.star")
    other[::-1].save(tmp_path / "other.star")
    (tmp_path / "secret.star").write_text("data_secret\n_password 1234\n")
    os.mkfifo(tmp_path / "pipe.star")
    (tmp_path / "zero.star").symlink_to("/dev/zero")
    path = tmp_path / "r.safetensors"
    cc.Result(g.model, g.latents, particles=other).save(path)
    assert cc.load_result(path).particles is not None
    tensors, meta = load_tensors(path, "result")
    text = json.dumps(SOURCES[name]).replace("{}", str(tmp_path))
    meta["source"] = json.loads(text)
    save_tensors(path, tensors, meta)
    opened = []
    with warnings.catch_warnings(action="ignore"):
        seen = outcome(lambda: opened.append(cc.load_result(path)))
    assert seen == "refused" or (seen == "silent: None" and opened[0].particles is None)
    if opened:
        assert "1234" not in repr(opened[0])


@pytest.mark.parametrize("name", ["6UO8", "../../../etc/passwd", "/etc/passwd", "https://a.b/c"])
@pytest.mark.parametrize("kind", ["result", "encoder"])
def test_the_name_of_a_structure_in_a_file_is_only_a_name(tmp_path, no_network, name, kind):
    opened, write = FILES[f"{kind}.safetensors"]
    path = tmp_path / f"{kind}.safetensors"
    write(things(), path)
    tensors, meta = load_tensors(path, kind)
    meta["model"]["structure"]["name"] = name
    meta["model"]["structure"]["title"] = name
    save_tensors(path, tensors, meta)
    with warnings.catch_warnings(action="ignore"):
        again = opened(path)
    assert again.model.structure.name == name
    again.model.structure.save(tmp_path / "again.pdb")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["again.pdb", path.name]


@pytest.mark.parametrize("chain", [";", "#", '"', "'", "A;exit", "a/b", "$x", "é"])
def test_a_chain_id_is_no_command_of_chimerax(tmp_path, chain):
    g = things()
    atoms = g.structure.atoms.copy()
    atoms.setChids(np.where(atoms.getChids() == "A", chain, "B"))
    model = cc.Model(cc.load_structure(atoms), modes=None, box_size=32, pixel_size=4.0)
    path = tmp_path / "a.cxc"
    seen = outcome(lambda: analysis.save_conformations(path, model, torch.zeros(1, 12)))
    if seen != "refused":
        colors = [line for line in path.read_text().split("\n") if line.startswith("color")]
        for line in colors:
            assert re.fullmatch(r"color #1/[A-Za-z0-9_.-]+ #[0-9a-fA-F]{6}", line), line


# Writers of atoms, each given a structure, model and latents.
def written(suffix, model, latents, tmp):
    path = tmp / f"a{suffix}"
    if suffix in (".dcd", ".cxc"):
        return analysis.save_conformations(path, model, latents)
    return model.structure.save(path)


FAR = {
    "NaN": math.nan,
    "infinity": math.inf,
    "-1000": -1000.0,
    "10000": 10_000.0,
    "1e8": 1e8,
}


@pytest.mark.parametrize("suffix", [".pdb", ".pdb.gz", ".cif", ".cif.gz"])
@pytest.mark.parametrize("value", FAR)
def test_no_file_of_atoms_holds_what_its_columns_do_not(tmp_path, suffix, value):
    atoms = things().structure.atoms.copy()
    atoms.setCoords(with_one(atoms.getCoords(), FAR[value]))
    path = tmp_path / f"a{suffix}"
    seen = outcome(lambda: molecule.write_structure(atoms, "a", path))
    if "cif" in suffix and math.isfinite(FAR[value]):
        assert seen == "silent: None"
        read = cc.load_structure(path).atoms.getCoords()
        np.testing.assert_allclose(read, atoms.getCoords(), atol=6e-4)
    else:
        assert seen == "refused" and not path.exists()


@pytest.mark.parametrize("suffix", [".pdb", ".cif", ".dcd", ".cxc", ".mrc"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30, 3e38])
def test_no_conformation_that_is_not_finite_is_written(tmp_path, suffix, value):
    g = things()
    latents = g.latents[:2].clone()
    latents[0, -1] = value
    write = analysis.save_densities if suffix == ".mrc" else analysis.save_conformations
    assert outcome(lambda: write(tmp_path / f"a{suffix}", g.model, latents)) == "refused"
    assert not list(tmp_path.iterdir())


def test_a_script_for_chimerax_opens_mmcif_where_pdb_text_is_too_narrow(tmp_path):
    g = things()
    moved = g.structure.with_coords(g.all_coords + 20_000).with_origin(g.structure.origin + 20_000)
    model = cc.Model(moved, modes=None, box_size=32, pixel_size=4.0)
    analysis.save_conformations(tmp_path / "a.cxc", model, torch.zeros(2, 12))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-models.cif", "a.cxc"]
    assert 'open "a-models.cif"' in (tmp_path / "a.cxc").read_text()


WRITERS = {
    "pdb": lambda g, tmp: g.structure.save(tmp / "a.pdb"),
    "pdb.gz": lambda g, tmp: g.structure.save(tmp / "a.pdb.gz"),
    "cif": lambda g, tmp: g.structure.save(tmp / "a.cif"),
    "cif.gz": lambda g, tmp: g.structure.save(tmp / "a.cif.gz"),
    "result": lambda g, tmp: g.result.save(tmp / "a.safetensors"),
    "population": lambda g, tmp: g.population.save(tmp / "a.safetensors"),
    "encoder": lambda g, tmp: g.encoder.save(tmp / "a.safetensors"),
    "particles": lambda g, tmp: g.particles.save(tmp / "a.star"),
    "map": lambda g, tmp: g.map.save(tmp / "a.mrc"),
    "motion.pdb": lambda g, tmp: cc.save_motion(tmp / "a.pdb", g.motions, n=2),
    "motion.dcd": lambda g, tmp: cc.save_motion(tmp / "a.dcd", g.motions, n=2),
    "motion.cxc": lambda g, tmp: cc.save_motion(tmp / "a.cxc", g.motions, n=2),
    "motion.mrc": lambda g, tmp: cc.save_motion(tmp / "a.mrc", g.motions, n=1),
    "motion.gif": lambda g, tmp: cc.save_motion(tmp / "a.gif", g.motions, n=2),
    "selection": lambda g, tmp: analysis.save_selection(tmp, g.motions, [0]),
    "checkpoint": lambda g, tmp: refined_again(g, blurs=4.0, checkpoint=tmp),
    "simulation": lambda g, tmp: two_particles(g, path=tmp / "a.star"),
}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
@pytest.mark.parametrize("name", WRITERS)
def test_written_files_have_the_usual_permissions(tmp_path, name, umask):
    things()
    before = os.umask(umask)
    try:
        WRITERS[name](things(), tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*.*")}
    assert modes and set(modes.values()) == {oct(0o666 & ~umask)}, modes


def twice_named(g, tmp):
    path = saved_star(g, tmp)
    again = tmp / "twice.star"
    again.write_text(path.read_text().replace("000002@", "000001@"))
    return again


# What warns, and where: of the user's line, not of this library's.
WARNINGS = {
    "compute_modes": lambda g, tmp: cc.compute_modes(g.structure, 1, cutoff=5.0, cache=False),
    "load_particles": lambda g, tmp: cc.load_particles(twice_named(g, tmp)),
    "view_structure": lambda g, tmp: cc.view_structure(g.structure),
    "explore": lambda g, tmp: cc.explore(g.result),
    "load_result": lambda g, tmp: cc.load_result(result_without_particles(g, tmp)),
    "refine": lambda g, tmp: cc.refine(
        g.model, with_a_constant_image(g), g.population, blurs=(4.0,), progress=False
    ),
}


def result_without_particles(g, tmp):
    g.particles.save(tmp / "gone.star")
    cc.Result(g.model, g.latents, particles=cc.load_particles(tmp / "gone.star")).save(
        tmp / "gone.safetensors"
    )
    (tmp / "gone.star").unlink()
    return tmp / "gone.safetensors"


def with_a_constant_image(g):
    pixels = g.particles.read_images().clone()
    pixels[0] = 0
    return replace(g.particles, images=pixels)


@pytest.mark.parametrize("name", WARNINGS)
def test_warnings_are_of_the_line_that_called(tmp_path, name):
    g = things()
    with pytest.warns(UserWarning) as caught:
        WARNINGS[name](g, tmp_path)
    ours = [warning for warning in caught if warning.category is UserWarning]
    assert {Path(warning.filename).name for warning in ours} == {Path(__file__).name}


def test_the_corpus_is_large():
    n_cases = len(CASES) + len(DAMAGED) + len(VALID) + 2 * len(NO_STACKS) + len(SOURCES)
    assert n_cases >= 2000
    assert len({case.id for case in CASES}) == len(CASES)

"""Planes of a Fourier transform added to a grid: the kernel of a reconstruction.

Imported by the function that needs it (see `_compiled`).
"""

import numpy as np

from .._compiled import compiled


@compiled
def insert_planes(
    sums: np.ndarray, values: np.ndarray, powers: np.ndarray, axes: np.ndarray
) -> None:
    """Add (b, box, box//2 + 1) `values` and `powers` to `sums`, on planes along (b, 2, 3) `axes`.

    Every sample is shared among the eight grid points around it.
    """
    n_images, box, _ = values.shape
    fine = sums.shape[0]
    step = fine / box
    limit = (box // 2) ** 2
    for image in range(n_images):
        across = axes[image, 0]
        up = axes[image, 1]
        for i in range(box):
            ky = i if i < box // 2 else i - box
            for kx in range(box // 2):
                # Both of a pair of opposite frequencies would be counted where kx = 0.
                if kx * kx + ky * ky >= limit or (kx == 0 and ky < 0):
                    continue
                x = step * (kx * across[0] + ky * up[0])
                y = step * (kx * across[1] + ky * up[1])
                z = step * (kx * across[2] + ky * up[2])
                real = values[image, i, kx].real
                imaginary = values[image, i, kx].imag
                if x < 0:
                    x, y, z, imaginary = -x, -y, -z, -imaginary
                power = powers[image, i, kx]
                left = int(np.floor(x))
                front = int(np.floor(y))
                low = int(np.floor(z))
                for dz in range(2):
                    in_z = 1 - abs(z - low - dz)
                    for dy in range(2):
                        in_zy = in_z * (1 - abs(y - front - dy))
                        row = sums[(low + dz) % fine, (front + dy) % fine]
                        for dx in range(2):
                            share = in_zy * (1 - abs(x - left - dx))
                            row[left + dx, 0] += share * real
                            row[left + dx, 1] += share * imaginary
                            row[left + dx, 2] += share * power

"""The mesh: which devices are beside each other."""

import dataclasses

import jax
import numpy as np
import pytest

from beit_jax.runtime import sharding


@dataclasses.dataclass(frozen=True)
class _Chip:
  """A TPU chip of a 4x4 slice, in the order in which JAX lists them: host by host, 2x2 chips each."""

  id: int
  slice_index: int = 0
  platform = "tpu"
  device_kind = "TPU v5 lite"
  core_on_chip = 0

  @property
  def process_index(self):
    return self.id // 4

  @property
  def coords(self):
    host, chip = divmod(self.id % 16, 4)
    return 2 * (host % 2) + chip % 2, 2 * (host // 2) + chip // 2, 0


def _is_ring(devices):
  """Whether each device is a neighbor of the next one, and the last of the first, in the grid or around its edge."""
  steps = [
    np.abs(np.subtract(a.coords, b.coords)) for a, b in zip(devices, np.roll(devices, -1), strict=True)
  ]
  return all(np.minimum(step, 4 - step).sum() == 1 for step in steps)


def _devices(data, fsdp, chips, monkeypatch):
  monkeypatch.setattr(sharding, "_mesh", lambda devices: devices)
  return sharding.make_mesh(data, fsdp, chips)


@pytest.mark.parametrize("fsdp", [2, 4, 16])
def test_an_fsdp_group_is_a_ring_of_neighbors(fsdp, monkeypatch):
  rows = _devices(-1, fsdp, [_Chip(i) for i in range(16)], monkeypatch)
  assert rows.shape == (16 // fsdp, fsdp) and len(set(rows.ravel())) == 16
  assert fsdp == 16 or all(_is_ring(row) for row in rows)


def test_an_fsdp_group_stays_in_one_slice(monkeypatch):
  chips = [_Chip(16 * part + i, part) for i in range(16) for part in (0, 1)]
  rows = _devices(-1, 4, chips, monkeypatch)
  assert rows.shape == (8, 4) and all(len({chip.slice_index for chip in row}) == 1 for row in rows)


def test_other_devices_keep_their_order():
  found = sharding.make_mesh(2, 4).devices
  assert found.ravel().tolist() == jax.devices()

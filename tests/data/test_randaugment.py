"""RandAugment: operations against images of the reference code, random draws against their distribution."""

import io

import numpy as np
import pytest
from PIL import Image

from beit_jax.data import pipeline, randaugment, sources
from beit_jax.data.views import ViewReader
from beit_jax.errors import UserError
from tests import reference

SPEC = "rand-m9-mstd0.5-inc1"
ARRAYS, CONFIG = reference.load("randaugment")
INTERPOLATED = ("Rotate", "Shear", "Translate")
FILL = tuple(int(c) for c in ARRAYS["fill"])


def _psnr(a, b):
  mse = ((a.astype(float) - b.astype(float)) ** 2).mean()
  return np.inf if mse == 0 else 10 * np.log10(255**2 / mse)


@pytest.mark.parametrize("row", CONFIG["results"], ids=lambda row: row["key"].removeprefix("out/"))
def test_operations_golden(row):
  name, magnitude, sign = row["op"], row["magnitude"], 1.0 if row["sign"] == "pos" else -1.0
  if row["args"]:
    assert randaugment.OPS[name].level(magnitude, sign) == pytest.approx(row["args"][0], abs=1e-12)
  image = Image.fromarray(ARRAYS["in/image"])
  found = np.asarray(randaugment.apply_op(image, name, magnitude, sign, FILL))
  wanted = ARRAYS[row["key"]]
  assert not np.array_equal(wanted, ARRAYS["in/image"])
  if name.startswith(INTERPOLATED):
    assert _psnr(found, wanted) >= 45
  else:
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", randaugment.OPS)
def test_every_magnitude_works(name):
  for magnitude in (0.0, 3.3, 10.0):
    for sign in (-1.0, 1.0):
      image = Image.fromarray(ARRAYS["in/image"][:48])
      found = randaugment.apply_op(image, name, magnitude, sign, FILL)
      assert found.size == image.size and found.mode == "RGB" and np.asarray(found).max() > 0


def test_operations_compose():
  image = randaugment.apply_op(Image.fromarray(ARRAYS["in/image"]), "Rotate", 9.0, 1.0, FILL)
  image = randaugment.apply_op(image, "PosterizeIncreasing", 9.0, 1.0, FILL)
  assert _psnr(np.asarray(image), ARRAYS["out/compose_Rotate_then_Posterize"]) >= 45


def test_names_and_fill():
  assert list(randaugment.OPS) == list(ARRAYS["names"])
  assert randaugment.fill_color((0.485, 0.456, 0.406)) == FILL == (124, 116, 104)


def test_distribution_of_draws():
  """20,000 images: fifteen operations with equal probability, applied with probability 1/2, N(9, 0.5) clipped at 10."""
  rng, policy, n = np.random.default_rng(0), randaugment.parse(SPEC), 20_000
  drawn = [op for _ in range(n) for op in randaugment.draw(rng, policy)]
  names, magnitudes, signs = (np.array(column) for column in zip(*drawn, strict=True))
  assert abs(len(drawn) - n) < 5 * np.sqrt(n / 2)  # two chances of 1/2
  counts = np.array([(names == name).sum() for name in randaugment.OPS])
  share = 1 / 15
  assert np.abs(counts - len(drawn) * share).max() < 5 * np.sqrt(len(drawn) * share * (1 - share))
  assert abs((signs > 0).mean() - 0.5) < 5 * 0.5 / np.sqrt(len(drawn))
  assert magnitudes.max() == 10.0  # clipped: P(N(9, 0.5) > 10) = 2.28 %
  assert (magnitudes == 10).mean() == pytest.approx(0.02275, abs=5 * np.sqrt(0.0222 / len(drawn)))
  inside = magnitudes[magnitudes < 10]
  assert inside.min() > 6 and abs(np.median(magnitudes) - 9) < 0.02
  # Mean of min(X, 10), X ~ N(9, 0.5): 9 - 0.5 * (phi(2) - 2 * (1 - Phi(2))) = 9 - 0.5 * 0.008491
  assert magnitudes.mean() == pytest.approx(8.99575, abs=5 * 0.5 / np.sqrt(len(drawn)))


def test_distribution_of_the_number_of_operations():
  rng, policy = np.random.default_rng(1), randaugment.parse(SPEC)
  lengths = np.bincount([len(randaugment.draw(rng, policy)) for _ in range(20_000)]) / 20_000
  np.testing.assert_allclose(lengths, [0.25, 0.5, 0.25], atol=0.017)


@pytest.mark.parametrize(
  "spec", ["rand", "augmix-m3", "rand-m9", "rand-m11-inc1", "rand-m9-m3-inc1", "rand-x2-inc1"]
)
def test_invalid_policy(spec):
  with pytest.raises(UserError, match="rand-m9-mstd0.5-inc1"):
    randaugment.parse(spec)


class _OneImage(sources.Source):
  def __init__(self):
    buffer = io.BytesIO()
    Image.fromarray(ARRAYS["in/image"]).save(buffer, "PNG")
    self._bytes = buffer.getvalue()

  def __len__(self):
    return 8

  def __getitem__(self, index):
    return {"image": self._bytes, "label": index}


def test_augmentation_depends_on_the_example_only():
  options = dict(crop="center", crop_scale=(1, 1), crop_ratio=(1, 1), flip=False, mean=(0.5,) * 3)
  options |= dict(crop_pct=1.0, resize="short_side", scaled_decode=False)
  views = {"image": ((64, 64), "bicubic")}

  def read_images(batch_size, **changes):
    batches = pipeline.train_batches(
      _OneImage(),
      ViewReader(views, {**options, **changes}),
      rows=np.arange(batch_size),
      batch_size=batch_size,
      total_steps=8 // batch_size,
      start_step=0,
      seed=3,
    )
    batches = list(batches)
    order = np.concatenate([batch["label"] for batch in batches])
    return np.concatenate([batch["image"] for batch in batches])[np.argsort(order)]

  plain = read_images(4, rand_augment="")
  assert (plain == ARRAYS["in/image"]).all()
  augmented = read_images(4, rand_augment=SPEC)
  np.testing.assert_array_equal(augmented, read_images(8, rand_augment=SPEC))
  changed = (augmented != plain).any((1, 2, 3))
  assert 3 <= changed.sum() <= 8
  with pytest.raises(UserError, match="fine-tuning"):
    ViewReader({**views, "token_image": ((8, 8), "lanczos")}, {**options, "rand_augment": SPEC})

"""VQ-KD against the reference: quantizer, k-means, the whole model with all gradients, and parameter counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax import losses, trees
from beit_jax.models import beit, vqkd
from beit_jax.models.vqkd import Vqkd
from beit_jax.weights import vqkd as files
from beit_jax.weights.kinds import variable_shapes
from tests import reference

DECAY = 0.99


@pytest.fixture(scope="module")
def golden():
  return reference.load("vqkd")


def _channels_last(array):
  return jnp.asarray(array.transpose(0, 2, 3, 1))


def _codebook(weight, cluster_size):
  return {"weight": jnp.asarray(weight), "cluster_size": jnp.asarray(cluster_size)}


def test_quantizer_golden(golden):
  arrays, _ = golden
  words, upstream = jnp.asarray(arrays["in/codebook"]), _channels_last(arrays["in/upstream_grad"])

  def total(z):
    z = vqkd.l2_normalize(z)
    ids, codes = vqkd.quantize(z, words)
    loss = vqkd.commitment(z, codes).mean()
    return (codes * upstream).sum() + loss, (ids, codes, loss, z)

  grad, (ids, codes, loss, z) = jax.grad(total, has_aux=True)(_channels_last(arrays["in/z"]))
  np.testing.assert_array_equal(ids.ravel(), arrays["out/ids"])
  np.testing.assert_allclose(codes, _channels_last(arrays["out/z_q"]), atol=1e-6)
  np.testing.assert_allclose(loss, arrays["out/loss"], atol=1e-6)
  np.testing.assert_allclose(grad, _channels_last(arrays["out/grad_z"]), atol=1e-5)
  distance = np.sort(vqkd.distances(z, words).reshape(-1, len(words)))
  np.testing.assert_allclose(distance[:, 1] - distance[:, 0], arrays["out/margin"], atol=1e-5)


def test_two_codebook_updates_golden(golden):
  arrays, _ = golden
  codebook = _codebook(arrays["in/codebook"], arrays["in/cluster_size"])
  for name, suffix in (("in/z", ""), ("in/z_second", "_second")):
    z = vqkd.l2_normalize(_channels_last(arrays[name]))
    ids, _ = vqkd.quantize(z, codebook["weight"])
    np.testing.assert_array_equal(ids.ravel(), arrays[f"out/ids{suffix}"])
    # In two parts, as microbatches are.
    parts = [vqkd.code_sums(z[i : i + 1], ids[i : i + 1], len(codebook["weight"])) for i in (0, 1)]
    codebook = vqkd.update_codebook(codebook, *map(sum, zip(*parts, strict=True)), DECAY)
    np.testing.assert_allclose(codebook["weight"], arrays[f"out/codebook{suffix}"], atol=1e-6)
    np.testing.assert_allclose(codebook["cluster_size"], arrays[f"out/cluster_size{suffix}"], atol=1e-5)


def test_kmeans_golden(golden):
  arrays, _ = golden
  centers, counts = vqkd.kmeans(*map(jnp.asarray, (arrays["kmeans/in_samples"], arrays["kmeans/in_centres"])))
  np.testing.assert_allclose(centers, arrays["kmeans/out_centres"], atol=1e-5)
  np.testing.assert_array_equal(counts, arrays["kmeans/out_counts"])
  assert (counts == 0).any()  # an empty cluster keeps its center


def test_the_first_codebook_is_made_of_samples_once():
  samples = vqkd.l2_normalize(jax.random.normal(jax.random.key(0), (50, 4)))
  empty = {**_codebook(np.zeros((8, 4)), np.zeros(8)), "initialized": jnp.zeros(1)}
  empty |= {"initial_cluster_size": jnp.zeros(8), "initial_weight": jnp.zeros((8, 4))}
  first = vqkd.initial_codebook(empty, samples, jax.random.key(1))
  np.testing.assert_allclose(np.linalg.norm(first["weight"], axis=-1), 1, atol=1e-6)
  assert first["initial_cluster_size"].sum() == 50 and first["initialized"][0] == 1
  second = vqkd.initial_codebook(first, samples[::-1], jax.random.key(2))
  np.testing.assert_array_equal(second["weight"], first["weight"])
  few = vqkd.initial_codebook(empty, samples[:5], jax.random.key(1))  # fewer samples than words
  assert np.isfinite(few["weight"]).all()


def test_unused_words_move_beside_used_ones():
  words = vqkd.l2_normalize(jax.random.normal(jax.random.key(0), (6, 8)))
  size = np.array([0, 10, 0.001, 20, 10, 0], np.float32)
  found = vqkd.replace_unused(_codebook(words, size), 0.01, jax.random.key(1))
  used = [1, 3, 4]
  np.testing.assert_array_equal(found["weight"][np.array(used)], words[np.array(used)])
  nearest = vqkd.distances(found["weight"], words).argmin(-1)
  assert all(int(word) in used for word in nearest)
  np.testing.assert_allclose(found["cluster_size"], [size.mean(), 10, size.mean(), 20, 10, size.mean()])
  same = vqkd.replace_unused(_codebook(words, size), 0.0, jax.random.key(1))
  np.testing.assert_array_equal(same["weight"], words)


def _model(arrays, config):
  encoder = reference.encoder_fields({**config["encoder"], "img_size": (config["encoder"]["img_size"],) * 2})
  encoder = {**encoder, "in_channels": 3, "dtype": "float32", "residual_dtype": "float32"}
  module = Vqkd(
    encoder,
    vocab_size=config["n_embed"],
    code_dim=config["embed_dim"],
    decoder_depth=config["decoder"]["depth"],
    teacher_dim=config["decoder_out_dim"],
  )
  state = reference.section(arrays, "vqkd/param/")
  buffers = {
    "quantize.cluster_size": np.zeros(64, np.float32),
    "quantize.embedding.initted": np.ones(1, "f4"),
  }
  shapes = trees.flatten(variable_shapes(module, encoder["image_size"]))
  assert {files.torch_name(name) for name in shapes} == state.keys() | buffers.keys()
  variables = trees.unflatten({name: _ours({**state, **buffers}, name) for name in shapes})
  return module, variables["params"], variables["codebook"]


def _ours(state, name):
  value = state[files.torch_name(name)]
  if name.endswith("/kernel"):
    value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
  return value


def test_model_golden(golden):
  arrays, config = golden
  module, params, codebook = _model(arrays, config["vqkd"])
  image, target = _channels_last(arrays["vqkd/in_image"]), arrays["vqkd/in_teacher_target"]
  x = vqkd.normalize(image)
  np.testing.assert_allclose(x, _channels_last(arrays["vqkd/out_preprocessed"]), atol=1e-6)
  variables = {"params": params, "codebook": codebook}
  np.testing.assert_array_equal(module.apply(variables, image, method="tokenize"), arrays["vqkd/out_ids"])
  h = module.apply(variables, x, method="encode")
  np.testing.assert_allclose(h, arrays["vqkd/out_to_quantizer"], atol=1e-5)

  def total(params):
    out = module.apply({"params": params, "codebook": codebook}, x)
    distillation = losses.cosine_distance(out["features"], target).mean()
    commitment = vqkd.commitment(out["z"], out["codes"]).mean()
    return distillation + commitment, (out, distillation, commitment)

  (loss, (out, distillation, commitment)), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
  np.testing.assert_array_equal(out["ids"], arrays["vqkd/out_ids"])
  codes = out["codes"].reshape(2, 4, 4, -1)
  np.testing.assert_allclose(codes, _channels_last(arrays["vqkd/out_z_q"]), atol=1e-5)
  np.testing.assert_allclose(out["features"], arrays["vqkd/out_reconstruction"], atol=1e-5)
  for found, name in ((loss, "loss"), (distillation, "rec_loss"), (commitment, "quant_loss")):
    np.testing.assert_allclose(found, arrays[f"vqkd/out_{name}"], atol=1e-5)
  wanted = reference.section(arrays, "vqkd/grad/")
  wanted = {name: _ours(wanted, f"params/{name}") for name in trees.flatten(grads)}
  reference.assert_gradients_close(grads, wanted)

  after = vqkd.update_codebook(codebook, *vqkd.code_sums(out["z"], out["ids"], module.vocab_size), DECAY)
  np.testing.assert_allclose(after["weight"], arrays["vqkd/out_codebook_after"], atol=1e-6)
  np.testing.assert_allclose(after["cluster_size"], arrays["vqkd/out_cluster_size_after"], atol=1e-5)


def _vit_parameters(width, depth, patch, channels, tokens):
  """Patch embedding, cls token, positions, blocks without a bias on k, and the final norm."""
  block = 2 * 2 * width + 3 * width**2 + 2 * width + width**2 + width + 8 * width**2 + 5 * width
  return patch**2 * channels * width + width + width + (1 + tokens) * width + depth * block + 2 * width


def test_parameter_counts_of_the_base_model():
  """The sizes of unilm's vqkd_encoder_base_decoder_3x768x12_clip."""
  d, n, c, f = 768, 196, 32, 512
  fields = {**beit.VARIANTS["base"], **beit.preset_fields("paper", "base", pretrain=True)}
  fields |= dict(image_size=(224, 224), patch_size=16, in_channels=3)
  module = Vqkd(fields, decoder_depth=3, teacher_dim=f)
  shapes = variable_shapes(module, (224, 224))
  parts = {name: trees.num_params(tree) for name, tree in shapes["params"].items()}
  assert parts == {
    "encoder": _vit_parameters(d, 12, 16, 3, n),
    "encode_task_layer": d * d + d + d * c + c,
    "decoder": _vit_parameters(d, 3, 1, c, n),
    "decode_task_layer": d * d + d + d * f + f,
  }
  assert shapes["codebook"]["weight"].shape == (8192, c)


def test_the_decoder_to_pixels_does_not_change_the_tokenizer():
  fields = {**beit.preset_fields("paper", "tiny", pretrain=True), "image_size": (8, 12), "patch_size": 4}
  fields |= dict(width=16, depth=1, num_heads=2, in_channels=3)
  module = Vqkd(fields, vocab_size=8, code_dim=4, decoder_depth=1, teacher_dim=6, pixel_depth=1)
  image = jax.random.uniform(jax.random.key(0), (2, 8, 12, 3))
  variables = jax.jit(module.init)(jax.random.key(1), image)

  def pixels(params):
    return module.apply({**variables, "params": params}, image)["pixels"].sum()

  grads = jax.jit(jax.grad(pixels))(variables["params"])
  touched = {name.split("/")[0] for name, g in trees.flatten(grads).items() if np.abs(g).max() > 0}
  assert touched == {"pixel_decoder", "pixel_head"}

  @jax.jit
  def run(variables):
    ids = module.apply(variables, image, method="tokenize")
    decoded = module.apply(variables, ids, (2, 3), method="decode")
    return decoded, module.apply(variables, vqkd.normalize(image))

  decoded, out = run(variables)
  np.testing.assert_allclose(decoded, out["pixels"].clip(0, 1), atol=1e-5)

"""Plans: names of slices, reading compiled programs, counting FLOPs in three ways, plans of tiny runs."""

import functools
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from beit_jax import masking
from beit_jax.errors import UserError
from beit_jax.models.beit import VARIANTS, Beit, BeitForMaskedImageModeling, preset_fields
from beit_jax.models.dvae import Dvae
from beit_jax.objectives import OBJECTIVES, stages
from beit_jax.plan import __main__ as plan
from beit_jax.plan import abstract, flops, hlo, roofline, search, topology
from beit_jax.plan import compile as compile_
from beit_jax.runtime import sharding
from tests import tiny

LIBTPU = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="no libtpu: `pip install -e '.[plan]'`"
)


# Names of slices.


@pytest.mark.parametrize(
  "text, name, devices, hosts",
  [
    ("v5e:16x16", "v5e:16x16", 256, 64),
    ("V5litepod:2x2", "v5e:2x2", 4, 1),
    ("v4:2x2x4", "v4:2x2x4", 32, 4),
    ("v5p:4x4x4", "v5p:4x4x4", 64, 16),
    ("v5e:1x1", "v5e:1x1", 1, 1),
    ("trillium:8x8", "v6e:8x8", 64, 16),
    ("cpu:8", "cpu:8", 8, 1),
  ],
)
def test_name_of_a_slice_is_parsed(text, name, devices, hosts):
  found = topology.parse(text)
  assert (found.name, found.num_devices, found.hosts) == (name, devices, hosts)


@pytest.mark.parametrize(
  "text, said",
  [
    ("v5:e", "v5p:4x4x4"),
    ("v6x:4x4", "did you mean 'v6e'"),
    ("h100:8", "choose from v4, v5e"),
    ("v5e", "v5e:16x16"),
    ("v5e:16", "2 sides"),
    ("v5e:2x2x2", "2 sides"),
    ("v4:8x8", "3 sides"),
    ("v5e:3x4", "even"),
    ("v5e:4x3", "even"),
    ("v5e:0x4", "1 to 16,384 chips, not 0"),
    ("v5e:1000x1000", "1 to 16,384 chips, not 1,000,000"),
    ("cpu:4x4", "1 side,"),
    ("cpu:100", "1 to 64 chips, not 100"),
  ],
)
def test_wrong_name_of_a_slice_is_explained(text, said):
  with pytest.raises(UserError, match="--topology=") as caught:
    topology.parse(text)
  assert said in str(caught.value)


# Reading compiled programs.


def test_loop_body_counts_as_often_as_it_runs():
  """Eight devices run a product and an all-reduce in a loop of 5, and one gather outside of it."""
  mesh = sharding.make_mesh(8, 1)
  rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)

  def step(x, w):
    def body(w, _):
      return w + x.T @ (x @ w), None  # the sum over the rows crosses the devices

    w, _ = jax.lax.scan(body, w, None, length=5)
    return w, jax.lax.with_sharding_constraint(2 * x, everywhere)

  x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=rows)
  w = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=everywhere)
  program = hlo.read(jax.jit(step, out_shardings=everywhere).lower(x, w).compile().as_text())
  reduced, gathered = program.collectives["all-reduce"], program.collectives["all-gather"]
  assert (reduced.count, reduced.bytes, reduced.unknown) == (5, 5 * 16 * 32 * 4, 0)
  assert (gathered.count, gathered.bytes) == (1, 64 * 16 * 4)
  assert set(program.collectives) == {"all-reduce", "all-gather"}
  assert program.flops == 5 * 2 * (2 * 8 * 16 * 32)  # 8 rows a device
  assert program.loops == (5,)


def test_loop_of_unknown_length_is_reported():
  mesh = sharding.make_mesh(8, 1)

  def step(x):
    return jax.lax.while_loop(lambda x: (x < 100).all(), lambda x: 2 * x, x)

  x = jax.ShapeDtypeStruct((64,), jnp.float32, sharding=sharding.batch_sharding(mesh))
  program = hlo.read(jax.jit(step).lower(x).compile().as_text())
  assert program.collectives["all-reduce"].unknown == program.collectives["all-reduce"].count == 1


TPU_TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: bf16[64,128]) -> bf16[4,128] {
  %p = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.7 = bf16[64,128]{1,0:T(8,128)(2,1)} all-reduce(%p), channel_id=1, to_apply=%add
  ROOT %cut = bf16[4,128]{1,0} dynamic-slice(%all-reduce.7, %p, %p), dynamic_slice_sizes={4,128}
}

%body (t: (s32[], f32[8,128], f32[6,128,128])) -> (s32[], f32[8,128], f32[6,128,128]) {
  %t = (s32[], f32[8,128]{1,0:T(8,128)S(1)}, f32[6,128,128]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%t), index=1
  %w = f32[6,128,128]{2,1,0:T(8,128)} get-tuple-element(%t), index=2
  %one = f32[128,128]{1,0:T(8,128)S(1)} fusion(%w, %i), kind=kLoop, calls=%pick
  %y = f32[8,128]{1,0:T(8,128)S(1)} convolution(%x, %one), dim_labels=bf_io->bf
  %all-gather-start = (f32[8,128]{1,0}, f32[128,128]{1,0}) all-gather-start(%y), channel_id=2, dimensions={0}
  %again = f32[128,128]{1,0} all-gather(%y), channel_id=2, dimensions={0}
  %all-gather-done = f32[128,128]{1,0} all-gather-done(%all-gather-start)
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  ROOT %r = (s32[], f32[8,128]{1,0:T(8,128)S(1)}, f32[6,128,128]{2,1,0:T(8,128)}) tuple(%next, %y, %w)
}

%pick (p0: f32[6,128,128], p1: s32[]) -> f32[128,128] {
  %p0 = f32[6,128,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,128,128]{2,1,0:T(8,128)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,128,128}
  ROOT %flat = f32[128,128]{1,0:T(8,128)} bitcast(%slice)
}

%until (t2: (s32[], f32[8,128], f32[6,128,128])) -> pred[] {
  %t2 = (s32[], f32[8,128]{1,0:T(8,128)S(1)}, f32[6,128,128]{2,1,0:T(8,128)}) parameter(0)
  %j = s32[] get-tuple-element(%t2), index=0
  %n = s32[] constant(12)
  ROOT %less = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (x0: f32[8,128], w0: f32[6,128,128], g: bf16[64,128]) -> bf16[4,128] {
  %x0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %w0 = f32[6,128,128]{2,1,0:T(8,128)} parameter(1)
  %g = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(2)
  %c = s32[] constant(0)
  %copy-start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x0)
  %copy-done = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %start = (s32[], f32[8,128]{1,0:T(8,128)S(1)}, f32[6,128,128]{2,1,0:T(8,128)}) tuple(%c, %copy-done, %w0)
  %loop = (s32[], f32[8,128]{1,0:S(1)}, f32[6,128,128]{2,1,0}) while(%start), condition=%until, body=%body
  ROOT %out = bf16[4,128]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_tpu_program_is_read():
  """TPU programs have products written as convolutions, asynchronous pairs, and all-reduces whose result is sliced.

  A collective in two pieces (which share a channel) counts once.
  """
  program = hlo.read(TPU_TEXT)
  assert program.flops == 6 * 2 * 8 * 128 * 128
  gathered, scattered = program.collectives["all-gather"], program.collectives["reduce-scatter"]
  assert (gathered.count, gathered.bytes) == (6, 6 * 128 * 128 * 4)
  assert (scattered.count, scattered.bytes) == (1, 64 * 128 * 2)
  assert len(program.collectives) == 2
  square, rows = 128 * 128 * 4, 8 * 128 * 4
  loop = 6 * (square + (rows + square) + square)  # a slice of w, not all of it; the start; the other piece
  total = loop + rows + 64 * 128 * 2 + 4 * 128 * 2
  assert program.traffic == pytest.approx(total, abs=6 * 64)  # loop counters


def test_only_taps_that_meet_an_input_count():
  """A batched product written as a convolution has its batch entries in a dilated window; then a padded one."""
  assert hlo.valid_positions(8, 8, 8, stride=7, low=0, dilation=8) == 8
  assert hlo.valid_positions(14, 3, 14, stride=1, low=1) == 14 * 3 - 2


# FLOPs. The formulas are independent of the count.


def _encoder_flops(fields):
  """Forward pass of a BEiT encoder for one image."""
  patch, width, depth = fields["patch_size"], fields["width"], fields["depth"]
  patches = math.prod(side // patch for side in fields["image_size"])
  tokens, hidden = patches + 1, int(width * fields["mlp_ratio"])
  embedding = 2 * patches * patch * patch * 3 * width
  attention = depth * (2 * tokens * width * 4 * width + 2 * 2 * tokens * tokens * width)
  mlp = depth * 2 * 2 * tokens * width * hidden
  return dict(embedding=embedding, attention=attention, mlp=mlp)


def _tokenizer_flops(pixels, *, hidden, blocks, groups, vocab_size):
  """Forward pass of the encoder of a discrete VAE for one image."""
  total, before = 2 * pixels * 7 * 7 * 3 * hidden, hidden
  for group in range(groups):
    width = hidden * 2**group
    inner = width // 4
    for _ in range(blocks):
      kernels = 9 * before * inner + 9 * inner * inner + 9 * inner * inner + inner * width
      total += 2 * pixels * (kernels + (before * width if before != width else 0))
      before = width
    pixels //= 4 if group < groups - 1 else 1
  return total + 2 * pixels * before * vocab_size


def _small(depth=2):
  fields = dict(
    VARIANTS["tiny"], depth=depth, image_size=(64, 64), **preset_fields("plus", "tiny", pretrain=True)
  )
  return BeitForMaskedImageModeling(fields, 512), fields | dict(patch_size=16, mlp_ratio=4.0)


def test_count_equals_the_formulas():
  module, fields = _small()
  image, slots = jnp.zeros((2, 64, 64, 3)), jnp.zeros((2, 6), jnp.int32)
  variables = jax.eval_shape(module.init, jax.random.key(0), image)
  head = 2 * 6 * 192 * 512
  formula = sum(_encoder_flops(fields).values()) + head
  assert flops.count(lambda v, x: module.apply(v, x, slots=slots), variables, image) == 2 * formula
  tokenizer = Dvae(n_hid=16, n_init=8, vocab_size=64, group_count=3)
  variables = jax.eval_shape(tokenizer.init, jax.random.key(0), image)
  traced = flops.count(lambda v, x: tokenizer.apply(v, x, method="logits"), variables, image)
  assert traced == 2 * _tokenizer_flops(64 * 64, hidden=16, blocks=2, groups=3, vocab_size=64)


def test_full_size_agrees_with_the_literature():
  """ViT-B/16 at 224: 17.6 billion multiplications and additions a forward pass (17.58 in timm); L/16: 61.6."""
  image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  for variant, wanted in (("base", 17.58), ("large", 61.60)):
    module = Beit(**VARIANTS[variant], image_size=(224, 224))
    variables = jax.eval_shape(module.init, jax.random.key(0), image)
    assert flops.count(module.apply, variables, image) / 2e9 == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("remat", [False, True])
def test_parts_of_a_step(remat):
  """The parts of the forward pass equal the formulas; rematerialization runs the blocks a second time."""
  changes = {"tokenizer.init_from": "stage:tokenizer", "model.remat": remat, "mesh.data": 1}
  config = ConfigDict(
    dict(stages=("tokenizer", "run"), tokenizer=tiny.config("dvae"), run=tiny.config("beit", **changes))
  )
  run = stages.resolve(config, Path("runs"))[1]
  step = abstract.make_step(run, jax.devices()[:1])
  found = compile_.flops_per_image(step, step.trace())
  encoder = _encoder_flops(step.plan.objective.module.encoder | dict(mlp_ratio=4.0))
  tokens = _tokenizer_flops(16 * 16, hidden=8, blocks=1, groups=2, vocab_size=16)
  assert found["forward"] == {**encoder, "tokenizer": tokens, "head": found["forward"]["head"]}
  assert found["step"] == sum(found["forward"].values()) + found["backward"]
  assert found["recomputed"] == (encoder["attention"] + encoder["mlp"] if remat else 0)


def test_count_agrees_with_xla_where_there_is_no_loop():
  module, _ = _small()
  image = jnp.zeros((4, 64, 64, 3))
  variables = jax.eval_shape(module.init, jax.random.key(0), image)
  grad = jax.grad(lambda v, x: jnp.square(module.apply(v, x)).sum())
  compiled = jax.jit(grad).lower(variables, jax.ShapeDtypeStruct(image.shape, image.dtype)).compile()
  ours = flops.count(grad, variables, image)
  assert ours == pytest.approx(hlo.read(compiled.as_text()).flops, rel=0.02)
  assert ours == pytest.approx(compiled.cost_analysis()["flops"], rel=0.12)  # it includes element-wise work


def test_scan_does_not_change_the_count():
  module, _ = _small(4)
  scanned = BeitForMaskedImageModeling({**module.encoder, "scan": True}, 512)
  image = jnp.zeros((2, 64, 64, 3))
  variables = jax.eval_shape(module.init, jax.random.key(0), image)

  def count(module):
    return flops.count(jax.grad(lambda v, x: jnp.square(module.apply(v, x)).sum()), variables, image)

  assert count(module) == count(scanned)


# Communication.


def test_masks_need_no_communication():
  """A mesh draws the same masks as one device, without collectives."""
  sample = jax.vmap(
    functools.partial(masking.block_mask, grid_size=(8, 8), num_masked=20, min_block_patches=4)
  )
  keys = jax.random.split(jax.random.key(3), 16)
  wanted = np.asarray(sample(keys))
  mesh = sharding.make_mesh(4, 2)
  with jax.set_mesh(mesh):
    data = jax.device_put(jax.random.key_data(keys), sharding.batch_sharding(mesh))
    run = jax.jit(lambda data: sharding.by_rows(sample)(jax.random.wrap_key_data(data)))
    found = run(data)
    program = hlo.read(run.lower(data).compile().as_text())
  assert found.sharding.spec == PartitionSpec(("data", "fsdp"))
  np.testing.assert_array_equal(np.asarray(found), wanted)
  assert program.collectives == {}


# Other settings, and the time of a step.


def test_settings_are_tried_in_order_if_the_state_fits():
  found = dict(
    model=dict(remat=False, scan=False),
    mesh=dict(data=8, fsdp=1),
    mesh_data=-1,
    microbatches=1,
    batch_size=64,
    state_bytes=16e9,
  )
  everything = list(search.settings(found, 1e12))
  both = {"model.remat": True, "model.scan": True}
  assert everything[:3] == [{"model.remat": True}, both, both | {"mesh.fsdp": 2}]
  assert everything[3:5] == [both | {"mesh.fsdp": 4}, both | {"mesh.fsdp": 8}]
  assert everything[5:] == [both | {"mesh.fsdp": 8, "microbatches": n} for n in (2, 4, 8)]
  scarce = list(search.settings(found, 4e9))
  assert scarce[0] == both | {"mesh.fsdp": 8}
  # With a fixed mesh.data, a larger mesh.fsdp alone would ask for more devices than there are.
  fixed = list(search.settings(found | {"mesh_data": 8}, 4e9))
  assert fixed[0] == both | {"mesh.fsdp": 8, "mesh.data": 1}
  assert search.flags("pretrain", {"mesh.fsdp": 2}) == ["--config.pretrain.mesh.fsdp=2"]


def test_slowest_of_three_bounds_a_step():
  where = topology.parse("v5e:2x2")
  found = dict(
    mesh=dict(data=4, fsdp=1),
    collectives={"all-reduce": dict(count=1, bytes=200e9, unknown=0)},
    flops_per_device=197e12,
    traffic_per_device=819e9,
    batch_size=1000,
    total_steps=86_400,
  )
  roof = roofline.estimate(found, where, 0.4, 500.0)
  assert roof["seconds"] == pytest.approx({"compute": 2.5, "memory": 1.0, "interconnect": 2.0})
  assert (roof["bound"], roof["step_seconds"]) == ("compute", pytest.approx(2.5))
  assert roof["days"] == pytest.approx(2.5)
  assert (roof["images_per_second"], roof["workers_per_host"]) == (pytest.approx(400), 1)
  slow = roofline.estimate(found, where, 0.4, 3.0)
  assert slow["workers_per_host"] == 134 and not slow["input_keeps_up"]
  assert roofline.estimate(found, topology.parse("cpu:4"), 0.4, 500.0) is None


def test_number_of_examples_comes_from_a_table_if_the_data_is_not_here(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  config = tiny.config("beit", **{"data.source": "tfds", "data.name": "imagenet2012", "data.fraction": 0.5})
  assert len(abstract.make_source(config, None)) == round(1_281_167 * 0.5)
  assert len(abstract.make_source(config, 77)) == 77
  config.data.name = "no_such_set"
  with pytest.raises(UserError, match="--examples=N"):
    abstract.make_source(config, None)


# The command.


@pytest.fixture
def flags_of(tmp_path):
  """`flags_of("--topology=cpu:2")` gives the command line for a tokenizer and a tiny run that uses it."""

  def make(*more, **changes):
    runs = {
      "tokenizer": tiny.raw("dvae").to_dict(),
      "run": tiny.raw(
        "beit", **{"tokenizer.init_from": "stage:tokenizer", "mesh.data": -1, **changes}
      ).to_dict(),
    }
    text = f"from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({runs!r} | "
    (tmp_path / "config.py").write_text(text + "{'stages': ('tokenizer', 'run')})\n")
    return [f"--config={tmp_path / 'config.py'}", *more]

  return make


@pytest.mark.parametrize(
  "words, said",
  [
    ([], "required: --topology"),
    (["--topology=v5e:3x5"], "even"),
    (["--topology=cpu:2", "--stage=nowhere"], "unknown; there are tokenizer, run"),
    (["--topology=cpu:2", "--utilization=two"], "expected a number"),
    (["--topology=cpu:2", "--utilization=1.5"], "from 0.01 to 1;"),
    (["--topology=cpu:2", "--examples=0"], "an integer from 1"),
    (
      ["--topology=cpu:2", "--config.run.batch_size=15"],
      "stage 'run' cannot be planned: config key 'batch_size'",
    ),
    (["--topology=cpu:2", "--workdir=x"], "writes nothing"),
    (["--topology=cpu:2", "--what=1"], "usage: python -m beit_jax.plan"),
  ],
)
def test_mistake_ends_in_one_message(words, said, flags_of, capsys):
  assert plan.main(flags_of(*words)) == 2
  captured = capsys.readouterr()
  assert said in captured.err and captured.out == ""
  assert "Traceback" not in captured.err


def test_dead_compiler_is_one_message(monkeypatch, flags_of, capsys):
  def dies(command, **_):
    return subprocess.CompletedProcess(command, -9, "", "")

  monkeypatch.setattr(subprocess, "run", dies)
  assert plan.main(flags_of("--topology=cpu:2")) == 2
  assert "signal 9: this machine has too little memory" in capsys.readouterr().err


def _plan(argv, status, capsys):
  assert plan.main([*argv, "--json"]) == status
  return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_plan_needs_no_data_tokenizer_or_accelerator(flags_of, capsys):
  made = _plan(flags_of("--topology=cpu:4"), 0, capsys)
  found = made["found"]
  assert (found["stage"], found["mesh"], made["fits"]) == ("run", {"data": 4, "fsdp": 1}, True)
  assert found["flops_per_device"] * 4 == pytest.approx(found["flops_per_image"]["step"] * 16, rel=0.1)
  assert set(found["collectives"]) == {"all-reduce"}
  gradients = found["parameters"] * 4
  bytes_ = found["collectives"]["all-reduce"]["bytes"]
  # Those of the position biases are summed before they are gathered into a table.
  assert gradients <= bytes_ < 2 * gradients
  assert found["memory"]["state"] == pytest.approx(3 * gradients, rel=0.01)
  assert made["roofline"] is None


@pytest.mark.slow
def test_setting_that_does_not_fit_names_one_that_does(flags_of, capsys):
  """The state alone is too large for one device, but not for two."""
  argv = flags_of("--topology=cpu:2", **{"model.scan": True, "model.remat": True, "model.width": 128})
  memory = _plan(argv, 0, capsys)["found"]["memory"]
  limit = (memory["peak"] - memory["state"] / 4) / topology.GIB
  assert plan.main([*argv, f"--hbm_gib={limit}"]) == 2
  said = capsys.readouterr().out
  assert "NO, " in said and "it does with --config.run.mesh.fsdp=2" in said
  made = _plan([*argv, f"--hbm_gib={limit}", "--tries=0"], 2, capsys)
  assert made["tried"] == [] and not made["fits"]


@pytest.mark.slow
def test_cached_tokens_are_planned_without_the_tokenizer(flags_of, capsys):
  made = _plan(flags_of("--topology=cpu:2", **{"tokenizer.cache": "not/here/yet"}), 0, capsys)
  found = made["found"]
  assert "tokenizer" not in found["flops_per_image"]["forward"]
  assert found["flops_per_device"] * 2 == pytest.approx(found["flops_per_image"]["step"] * 16, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
  "objective",
  [*sorted(OBJECTIVES.keys() - {"beit", "vqkd", "knn"}), pytest.param("beit_pixels", marks=pytest.mark.slow)],
)  # needs a stage; trains nothing
def test_every_objective_can_be_planned(objective, tmp_path, capsys):
  run = tiny.raw(objective, **{"mesh.data": -1}).to_dict()
  text = f"from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({run!r})\n"
  (tmp_path / "config.py").write_text(text)
  made = _plan([f"--config={tmp_path / 'config.py'}", "--topology=cpu:2"], 0, capsys)
  flops_ = made["found"]["flops_per_image"]
  assert flops_["backward"] > 0 and all(value >= 0 for value in flops_["forward"].values())
  # Nothing is computed twice. On such small maps many taps lie on padding, which the compiled program does not count.
  assert made["found"]["flops_per_device"] * 2 == pytest.approx(
    flops_["step"] * made["found"]["batch_size"], rel=0.25
  )


@LIBTPU
@pytest.mark.slow
def test_tpu_compiler(flags_of, capsys):
  """Gradients are summed once a step, with accumulation too; FSDP gathers parameters; nothing is computed twice."""
  one = _plan(flags_of("--topology=v5e:2x2"), 0, capsys)
  parts = _plan(flags_of("--topology=v5e:2x2", "--config.run.microbatches=2"), 0, capsys)
  moved = [made["found"]["collectives"]["all-reduce"]["bytes"] for made in (one, parts)]
  assert moved[1] < 1.3 * moved[0]
  found = one["found"]
  assert found["flops_per_device"] * 4 == pytest.approx(found["flops_per_image"]["step"] * 16, rel=0.1)
  assert one["roofline"]["step_seconds"] > 0 and math.isfinite(one["roofline"]["days"])
  wide = _plan(
    flags_of("--topology=v5e:2x2", "--config.run.mesh.fsdp=4", "--config.run.model.width=256"), 0, capsys
  )
  assert "all-gather" in wide["found"]["collectives"]
  assert wide["found"]["flops_per_device"] * 4 == pytest.approx(
    wide["found"]["flops_per_image"]["step"] * 16, rel=0.1
  )


@LIBTPU
@pytest.mark.slow
def test_tpu_compiler_refuses_what_is_too_large(flags_of, capsys):
  argv = flags_of("--topology=v5e:1x1", "--config.run.batch_size=524288", "--examples=1000000", "--tries=0")
  made = _plan(argv, 2, capsys)
  assert not made["fits"] and made["found"]["memory"]["peak"] > made["hbm"] > 15 * topology.GIB


def test_memory_of_a_refusal():
  message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 24.41G of 15.75G hbm. Exceeded it by 8.66G"
  assert compile_.memory_of_refusal(message) == {"peak": 24.41 * topology.GIB, "limit": 15.75 * topology.GIB}
  message = (
    "CompileTimeHbmOom: Ran out of memory on HBM, what HLO needs (305.82G) exceeds available HBM (15.75G)."
  )
  assert compile_.memory_of_refusal(message) == {"peak": 305.82 * topology.GIB, "limit": 15.75 * topology.GIB}
  assert compile_.memory_of_refusal("RESOURCE_EXHAUSTED: vmem") == {}
  assert compile_.memory_of_refusal("INVALID_ARGUMENT: nothing of the kind") is None


def test_missing_libtpu_names_the_extra():
  code = (
    "import sys; sys.modules['libtpu'] = None\n"
    "import importlib.util as u; find = u.find_spec\n"
    "u.find_spec = lambda name, *a: None if name == 'libtpu' else find(name, *a)\n"
    "from beit_jax.plan import topology\n"
    "topology.devices(topology.parse('v5e:2x2'))"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert "pip install -e '.[plan]'" in done.stderr

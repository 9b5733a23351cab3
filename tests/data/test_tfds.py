"""TFDS data sets: which prepared version a name means, and which features are images and labels.

The data sets are written here, as TFDS does, without TensorFlow.
"""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from beit_jax.data import examples, sources
from beit_jax.errors import UserError
from tests import tiny
from tests.data.test_folders import PNG

features = tfds.features
LABEL = features.ClassLabel(names=["cat", "dog", "emu"])


def _prepare(folder, spec, rows, name="toy"):
  """Writes the split "train" of a data set; `rows` map paths of features to bytes or lists of numbers."""
  folder.mkdir(parents=True)
  split = dict(
    name="train",
    shardLengths=[str(len(rows))],
    numBytes="100",
    filepathTemplate="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
  )
  *config, version = folder.relative_to(next(p for p in folder.parents if p.name == name)).parts
  info = dict(name=name, version=version, fileFormat="array_record", splits=[split])
  if config:
    info["configName"] = config[0]
  (folder / "dataset_info.json").write_text(json.dumps(info))
  spec = features.FeaturesDict(spec)
  (folder / "features.json").write_text(json.dumps(spec.to_json()))
  spec.save_metadata(str(folder))
  writer = ArrayRecordWriter(str(folder / f"{name}-train.array_record-00000-of-00001"), "group_size:1")
  for row in rows:
    example = tf_example_pb2.Example()
    for key, value in row.items():
      feature = example.features.feature[key]
      if isinstance(value, bytes):
        feature.bytes_list.value.append(value)
      elif isinstance(value[0], float):
        feature.float_list.value.extend(value)
      else:
        feature.int64_list.value.extend(value)
    writer.write(example.SerializeToString())
  writer.close()
  return folder


def _image_and_label(folder, label=1):
  return _prepare(folder, {"image": features.Image(), "label": LABEL}, [{"image": PNG, "label": [label]}])


def _source(root, name="toy", image_key="image", label_key="label"):
  return sources.TfdsSource(name, "train", str(root), image_key, label_key)


def test_several_configs_are_refused_and_listed(tmp_path):
  for config, label in (("small", 0), ("large", 2)):
    _image_and_label(tmp_path / "toy" / config / "1.0.0", label)
  for name in ("toy", "toy:1.0.0"):
    with pytest.raises(UserError, match="has several configs; name one of toy/large.*, toy/small"):
      _source(tmp_path, name)
  for name, label in (("toy/small", 0), ("toy/large:1.0.0", 2)):
    assert _source(tmp_path, name)[0]["label"] == label


def test_the_version_of_the_named_config_is_taken(tmp_path):
  _image_and_label(tmp_path / "toy" / "small" / "1.0.0")
  _image_and_label(tmp_path / "toy" / "large" / "2.0.0")
  with pytest.raises(UserError, match="large has the versions 2.0.0, not 1.0.0"):
    _source(tmp_path, "toy/large:1.0.0")
  with pytest.raises(UserError, match="several configs; name one of toy/large:1.0.0, toy/small:1.0.0"):
    _source(tmp_path, "toy:1.0.0")


def test_a_single_config_and_the_newest_version_need_no_name(tmp_path):
  for version in ("1.9.0", "1.10.0"):
    _image_and_label(tmp_path / "toy" / "small" / version)
  assert _source(tmp_path).description["name"] == "toy/small/1.10.0"
  assert _source(tmp_path, "toy:1.9.0").description["name"] == "toy/small/1.9.0"
  assert _source(tmp_path, "toy/small/1.9.0").description["name"] == "toy/small/1.9.0"


def test_a_data_set_needs_a_name(tmp_path):
  _image_and_label(tmp_path / "toy" / "1.0.0")
  with pytest.raises(UserError, match="data.name='': no prepared data set"):
    _source(tmp_path, "")


@pytest.mark.parametrize("link", ["toy", "toy/1.0.0"])
def test_links_to_data_sets_are_followed(tmp_path, link):
  _image_and_label(tmp_path / "disk" / "toy" / "1.0.0")
  (tmp_path / "data" / link).parent.mkdir(parents=True)
  (tmp_path / "data" / link).symlink_to(tmp_path / "disk" / link)
  assert _source(tmp_path / "data")[0]["label"] == 1


def test_nested_features_are_named_by_a_path(tmp_path):
  spec = {
    "views": {"left": features.Image(), "class": LABEL},
    "objects": features.Sequence({"label": LABEL, "area": features.Scalar(np.int64)}),
    "map": {"pixels": features.Image(shape=(None, None, 1))},
  }
  row = {
    "views/left": PNG,
    "views/class": [2],
    "objects/label": [0, 2],
    "objects/area": [5, 6],
    "map/pixels": PNG,
  }
  _prepare(tmp_path / "toy" / "1.0.0", spec, [row])
  several = _source(tmp_path, image_key="views/left", label_key="objects/label")
  assert several.multi_label and several.class_names == ("cat", "dog", "emu")
  assert several[0]["image"] == PNG and several[0]["label"].tolist() == [1, 0, 1]
  assert _source(tmp_path, image_key="views/left", label_key="views/class")[0]["label"] == 2
  assert _source(tmp_path, image_key="views/left", label_key="map/pixels")[0]["label_map"] == PNG
  with pytest.raises(
    UserError, match="data.label_key='objects/name'.*'objects/area', 'objects/label', 'views/class'"
  ):
    _source(tmp_path, image_key="views/left", label_key="objects/name")


@pytest.mark.parametrize(
  "file, text", [("dataset_info.json", "{}"), ("features.json", "{"), ("features.json", None)]
)
def test_damaged_data_sets_are_refused(tmp_path, file, text):
  path = _image_and_label(tmp_path / "toy" / "1.0.0") / file
  path.unlink()
  if text:
    path.write_text(text)
  with pytest.raises(UserError, match="toy/1.0.0 is no complete TFDS data set .*; copy or build it again"):
    _source(tmp_path)


def test_a_format_without_random_access_is_refused(tmp_path):
  folder = _image_and_label(tmp_path / "toy" / "1.0.0")
  info = json.loads((folder / "dataset_info.json").read_text())
  (folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
  command = f"tfds convert_format --dataset_version_dir={folder} --out_file_format=array_record"
  with pytest.raises(
    UserError, match=f"found tfrecord, which is read in order only; convert it with: {command}"
  ):
    _source(tmp_path)


ARRAYS = {
  "rgb": (features.Tensor(shape=(4, 5, 3), dtype=np.uint8), list(range(60))),
  "gray": (features.Tensor(shape=(4, 5), dtype=np.uint8), list(range(20))),
}


def test_other_arrays_are_images_if_the_range_of_their_values_is_known(tmp_path):
  spec = features.Tensor(shape=(1, 3, 1), dtype=np.float32)
  _prepare(tmp_path / "toy" / "1.0.0", {"image": spec}, [{"image": [-1.0, 0.0, 1.0]}])
  options = dict(
    source="tfds", name="toy", split="train", data_dir=str(tmp_path), image_key="image", label_key=""
  )
  source = sources.make_source(
    tiny.config(
      "beit", **{f"data.{k}": v for k, v in options.items()}, **{"data.value_range": (-1.0, 1.0)}
    ).data.to_dict()
  )
  pixels = examples.decode(source[0], 0, source.pixel_rule).pixels()
  np.testing.assert_array_equal(pixels[0, :, 0], [0, 128, 255])


@pytest.mark.parametrize("key", ARRAYS)
def test_uint8_arrays_are_images(tmp_path, key):
  spec, values = ARRAYS[key]
  _prepare(tmp_path / "toy" / "1.0.0", {key: spec}, [{key: values}])
  pixels = examples.decode(_source(tmp_path, image_key=key, label_key="")[0], 0).pixels()
  wanted = np.asarray(values).reshape(4, 5, -1)
  np.testing.assert_array_equal(pixels, np.broadcast_to(wanted, (4, 5, 3)))


def test_integer_arrays_are_label_maps(tmp_path):
  spec = {"image": features.Image(), "map": features.Tensor(shape=(2, 3), dtype=np.int64)}
  _prepare(tmp_path / "toy" / "1.0.0", spec, [{"image": PNG, "map": [0, 1, 2, 3, 4, 5]}])
  labels = _source(tmp_path, label_key="map")[0]["label_map"]
  np.testing.assert_array_equal(examples.decode_labels(labels, "map"), [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
  "spec, fact",
  [
    (features.Tensor(shape=(4, 5, 3), dtype=np.float32), "float32: the range of its values is not known"),
    (features.Image(shape=(4, 5, 1), dtype=np.float32), "float32: the range of its values is not known"),
    (features.Tensor(shape=(3, 4, 5), dtype=np.uint8), r"\(3, 4, 5\), uint8 has its channels first"),
    (LABEL, "this ClassLabel .*is no image"),
    (features.Text(), "this Text .*is no image"),
    (features.Sequence(features.Image()), "this Sequence .*is no image"),
  ],
)
def test_features_that_are_no_images_are_refused(tmp_path, spec, fact):
  _prepare(tmp_path / "toy" / "1.0.0", {"image": spec}, [])
  with pytest.raises(UserError, match=f"data.image_key='image': .*{fact}"):
    _source(tmp_path, label_key="")


@pytest.mark.parametrize(
  "spec, fact",
  [
    (features.Text(), "holds no labels"),
    (features.Scalar(np.float32), "holds no labels"),
    (features.Tensor(shape=(10,), dtype=np.int64), "holds no labels"),
    (features.Tensor(shape=(4, 5), dtype=np.float32), "holds no labels"),
    (features.Sequence(features.Scalar(np.int64)), "does not say how many classes"),
    (features.Sequence(features.Text()), "holds no labels"),
    (features.FeaturesDict({"a": LABEL}), "holds no labels"),
  ],
)
def test_features_that_are_no_labels_are_refused(tmp_path, spec, fact):
  _prepare(tmp_path / "toy" / "1.0.0", {"image": features.Image(), "label": spec}, [])
  with pytest.raises(UserError, match=f"data.label_key='label': .*{fact}"):
    _source(tmp_path)

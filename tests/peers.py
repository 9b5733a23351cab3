"""PyTorch and its libraries as references; `from tests.peers import ...` skips a file if they are not installed."""

import importlib.metadata
import importlib.util
import warnings

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra 'torch')")
if importlib.util.find_spec("torchvision") is None:
  pytest.skip("torchvision is not installed (extra 'torch')", allow_module_level=True)
with warnings.catch_warnings():
  warnings.simplefilter("ignore")
  # timm imports torchvision. Its wheels on PyPI have operators for CUDA only, so that with a CPU build of PyTorch two
  # names are missing, which timm never calls.
  if torch.version.cuda is None and "+cpu" not in importlib.metadata.version("torchvision"):
    from torch import library

    _library = library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
  timm = pytest.importorskip("timm", reason="timm is not installed (extra 'torch')")
  safetensors_torch = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
  transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra 'torch')")

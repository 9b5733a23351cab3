"""The lock of a run folder says whether its last holder ended by itself."""

import pytest

from beit_jax.runtime import lock
from beit_jax.runtime.preemption import Stopped


@pytest.mark.parametrize("error", [None, Stopped(15), ValueError("boom")], ids=repr)
def test_a_run_that_ends_by_itself_leaves_no_lock_behind(error, tmp_path, caplog):
  try:
    with lock.exclusive_lock(tmp_path):
      assert lock.holder(tmp_path)["pid"]
      if error is not None:
        raise error
  except (Stopped, ValueError) as found:
    assert found is error
  assert not lock.holder(tmp_path) and not lock.held(tmp_path)
  with lock.exclusive_lock(tmp_path):
    assert "without releasing its lock" not in caplog.text

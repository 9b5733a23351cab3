"""The exceptions that a user sees as one message, without a traceback."""


class UserError(Exception):
  """A mistake in the input: a key, a file, a data set or a checkpoint.

  The message names the key or file, what was found, what was expected and what to do. The commands print it without a
  traceback and exit with `status`.
  """

  status = 2


class TransientError(UserError):
  """A failure that may be transient; launchers rerun the command."""

  status = 75


class CollapseError(UserError):
  """The codebook of a tokenizer has collapsed in training, and `collapse.stop` is set."""


class BadImage(UserError):
  """An image that cannot be read; names the file or the example. Training continues with another image."""

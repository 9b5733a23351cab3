"""The one exception a user is meant to see."""


class UserError(Exception):
  """A mistake in what the user gave us: a key, a file, a data set, a checkpoint.

  The message names the key or file, what was found, what was expected and what to do. `main` prints
  it without a traceback and exits with `status`.
  """

  status = 2


class TransientError(UserError):
  """Nobody's mistake: the same command may well succeed a little later, and launchers give it again."""

  status = 75


class CollapseError(UserError):
  """The codebook of a tokenizer in training has collapsed, and the config asks to stop then."""


class BadImage(UserError):
  """One image that cannot be read; names the file, or the example. Training goes on with another."""

"""Parameters addressed by path: the only place that touches JAX key paths.

One notation everywhere (weight decay, layer-wise lr, sharding, transfer): the keys of the tree joined by
"/", e.g. "encoder/block_03/attn/qkv/kernel", searched with a regular expression; the first rule that
matches wins and a path that no rule matches is an error.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax


def _part(key: Any) -> str:
  for attribute in ("key", "name", "idx"):
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  return str(key)


def named_map(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
  """`jax.tree.map` whose `fn` gets the path first: `fn(name, leaf, *leaves_of_rest)`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, *leaves: fn("/".join(map(_part, path)), *leaves), tree, *rest
  )


def flatten(tree: Any) -> dict[str, Any]:
  """Nested containers -> `{"a/b/c": leaf}`, in tree order."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {"/".join(map(_part, path)): leaf for path, leaf in leaves}


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
  """The inverse of `flatten` for nested dicts."""
  tree: dict[str, Any] = {}
  for name, leaf in flat.items():
    *parents, last = name.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def first_match(rules: Sequence[tuple[str, Any]], name: str) -> Any:
  """The value of the first rule `(regex, value)` whose regex is found in `name`."""
  for pattern, value in rules:
    if re.search(pattern, name):
      return value
  raise KeyError(f"no rule matches parameter {name!r}; the rules are {[p for p, _ in rules]}")


def match_rules(rules: Sequence[tuple[str, Any]], tree: Any) -> Any:
  """A tree of the values that the rules give to each leaf's path. Raises KeyError on a path without rule."""
  return named_map(lambda name, _: first_match(rules, name), tree)


def num_params(tree: Any) -> int:
  """Number of values in all leaves, which are arrays or `jax.ShapeDtypeStruct`s."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def num_bytes(tree: Any) -> int:
  """Size of all leaves, which are arrays or `jax.ShapeDtypeStruct`s."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

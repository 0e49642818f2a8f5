"""Keywords of constructors: a mistyped or foreign one is refused with the name that was meant.

This happens before `__init__` runs. Python would refuse it as well, without the name.
"""

import difflib
from types import FunctionType
from typing import Any

from refax.errors import KeywordError

_VAR_KEYWORDS = 0x08  # the flag of a code object that takes **kwargs

SYNONYMS = {
  # torch
  "bias": ("use_bias",),
  "in_channels": ("in_features", "num_features"),
  "out_channels": ("out_features", "features"),
  "stride": ("strides",),
  "dilation": ("kernel_dilation",),
  "groups": ("feature_group_count", "num_groups"),
  "eps": ("epsilon",),
  "p": ("rate", "dropout_rate"),
  "dropout": ("dropout_rate", "rate"),
  "attn_dropout": ("attention_dropout_rate", "dropout_rate"),
  "num_channels": ("num_features",),
  "normalized_shape": ("num_features",),
  "elementwise_affine": ("use_scale",),
  "affine": ("use_scale",),
  "embedding_dim": ("features",),
  "hidden_size": ("hidden_features",),
  "input_size": ("in_features",),
  "output_size": ("out_features",),
  "embed_dim": ("in_features", "features"),
  "d_model": ("features", "in_features"),
  "dim_feedforward": ("hidden_features",),
  "nhead": ("num_heads",),
  "n_heads": ("num_heads",),
  "kdim": ("in_kv_features",),
  "norm_first": ("pre_norm",),
  "batch_first": ("time_major",),
  "params": ("model",),
  # Keras
  "units": ("out_features", "hidden_features"),
  "filters": ("out_features",),
  "input_dim": ("in_features", "num_embeddings"),
  "output_dim": ("out_features", "features"),
  "kernel_initializer": ("kernel_init",),
  "bias_initializer": ("bias_init",),
  "embeddings_initializer": ("embedding_init",),
  "recurrent_initializer": ("recurrent_kernel_init",),
  "dilation_rate": ("kernel_dilation",),
  "activation": ("activation_fn",),
  "center": ("use_bias",),
  "scale": ("use_scale",),
  "return_state": ("return_carry",),
  "go_backwards": ("reverse",),
  # Linen, Haiku, Equinox
  "features": ("out_features", "num_features", "hidden_features"),
  "in_size": ("in_features",),
  "out_size": ("out_features",),
  "output_channels": ("out_features",),
  "kernel_shape": ("kernel_size",),
  "w_init": ("kernel_init",),
  "b_init": ("bias_init",),
  "with_bias": ("use_bias",),
  "key": ("rngs",),
  "rng": ("rngs",),
  "seed": ("rngs",),
  "optimizer": ("tx",),
  "optim": ("tx",),
  "lr": ("tx",),
  "learning_rate": ("tx",),
}
"""What other libraries call an argument: the names that it may have here, the likeliest first."""

_NOTES = {
  "affine": "; and use_bias=",
  "elementwise_affine": "; and use_bias=",
  "batch_first": ", which is its opposite",
  "key": ": nnx.Rngs(0)",
  "rng": ": nnx.Rngs(0)",
  "seed": ": nnx.Rngs(0)",
  "lr": ": optax.adam(1e-3)",
  "learning_rate": ": optax.adam(1e-3)",
}


def check_keywords(cls: Any, kwargs: dict[str, Any]) -> None:
  """Raise KeywordError if the constructor of a class does not take one of the keywords.

  This is part of building every layer: what is accepted is kept on the class that defines
  `__init__`, and a check takes 0.2 us.
  """
  held = cls._accepted
  if held is None or held[0] is not cls.__init__:
    cls._accepted = held = (cls.__init__, accepted_by(cls.__init__))
  accepted = held[1]
  if accepted is not None and not kwargs.keys() <= accepted:
    _refuse(cls, kwargs, accepted)


def accepted_by(init: Any) -> frozenset[str] | None:
  """The keywords of a constructor; None if it may take any, or cannot be looked into."""
  if init is object.__init__:
    return frozenset()  # Python would take any without a word, as Node has a `__new__`
  if type(init) is not FunctionType or init.__code__.co_flags & _VAR_KEYWORDS:
    return None
  code = init.__code__
  named = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
  return frozenset(named[max(1, code.co_posonlyargcount) :])


def _refuse(cls: type, kwargs: dict[str, Any], accepted: frozenset[str]) -> None:
  init: Any = cls.__init__
  if init is object.__init__ and cls.__new__.__module__ != "refax.core.node":
    return  # the user's `__new__` has taken them
  name = next(name for name in kwargs if name not in accepted)
  free = accepted - kwargs.keys()
  meant = next((x for x in SYNONYMS.get(name, ()) if x in free), None)
  note = "" if meant is None else _NOTES.get(name, "")
  if meant is None:
    meant = next(iter(difflib.get_close_matches(name, sorted(free), n=1)), None)
  known = [x for x in init.__code__.co_varnames if x in accepted] if accepted else []
  raise KeywordError.unknown(cls.__name__, name, kwargs[name], meant, note, known)

"""Random streams: a key and a counter, advanced in place, so that no key is used twice."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from refax import _jax
from refax.core import storage, text
from refax.core.filters import Filter, to_predicate
from refax.core.flatten import walk_nodes
from refax.core.mesh import enter_mesh
from refax.core.observe import note
from refax.core.pytree import Pytree
from refax.core.variable import Variable
from refax.errors import MissingRngError, RngKeyError
from refax.typing import ArrayLike

Splits = int | tuple[int, ...]


class RngState(Variable[jax.Array]):
  """The state of a random stream.

  >>> from refax import nnx
  >>> issubclass(nnx.RngKey, nnx.RngState)
  True
  """

  detached = True
  _is_random: ClassVar[bool] = True


class RngCount(RngState):
  """How many keys a stream has given.

  >>> from refax import nnx
  >>> rngs = nnx.Rngs(0); _ = rngs(); int(rngs.default.count)
  1
  """


class RngKey(RngState):
  """The key that a stream folds its count into.

  >>> from refax import nnx
  >>> nnx.Rngs(0).default.key.shape
  ()
  """


def _as_key(key: Any, tag: str) -> jax.Array:
  """A typed key, from a seed, a typed key, or raw key data."""
  if isinstance(key, Variable):
    key = key.get_value()
  if isinstance(key, Pytree):  # Rngs with a default stream has every attribute
    raise RngKeyError.value(tag, key)
  dtype = getattr(key, "dtype", None)
  if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
    return key
  if isinstance(key, int) or (dtype is not None and jnp.issubdtype(dtype, jnp.integer)):
    if jnp.shape(key) == ():
      return jax.random.key(key)
    if dtype == jnp.uint32:
      return jax.random.wrap_key_data(jnp.asarray(key))
  raise RngKeyError.value(tag, key)


def _advance(key: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The key of this count, and the next count."""
  return jax.random.fold_in(key, count), count + 1


_advance_now = jax.jit(_advance)
"""Eager: one call instead of ten; a jaxpr keeps the operations as they are."""


def _peek(variable: Variable) -> jax.Array:
  """The buffer of a Variable, uncopied: for a function that keeps and donates nothing."""
  cell = variable.get_raw_value()
  enter_mesh((cell,))
  note(variable, cell)
  return _jax.peek_cell(cell)


def _concrete(count: Variable) -> int | None:
  """A count as a number, if it is one and known now."""
  cell = count.get_raw_value()
  if not _jax.no_trace_active() or _jax.is_tracer(cell) or count.shape != ():
    return None
  return int(_peek(count) if _jax.is_ref(cell) else cell)


class _Step(NamedTuple):
  """A stream was forked from another one that had given `drawn` keys, and split if there is a k."""

  drawn: int
  k: Splits | None = None

  def key(self, key: jax.Array) -> jax.Array:
    """The key of the new stream, from that of the old one."""
    new = jax.random.fold_in(key, self.drawn)
    return new if self.k is None else jax.random.split(new, self.k)


class _Samplers:
  """Every sampler of `jax.random` as a method that draws a key first."""

  __slots__ = ()

  if TYPE_CHECKING:  # the methods are made below, from the names

    def __getattr__(self, name: str) -> Any: ...


def _sampler(sample: Callable) -> Callable:
  @functools.wraps(sample, assigned=("__name__",), updated=())
  def method(self: Any, *args: Any, **kwargs: Any) -> jax.Array:
    return sample(self(), *args, **kwargs)

  method.__doc__ = f"`jax.random.{sample.__name__}` with the next key of this stream."
  return method


def _initializer(make: Callable) -> Callable:
  @functools.wraps(make, assigned=("__name__",), updated=())
  def method(self: Any, *args: Any, **kwargs: Any) -> Callable[..., jax.Array]:
    init = make(*args, **kwargs)
    return lambda *a, **k: init(self(), *a, **k)

  method.__doc__ = f"`jax.nn.initializers.{make.__name__}`, with a key of this stream a call."
  return method


# fmt: off
SAMPLERS = (
  "ball", "beta", "bernoulli", "binomial", "bits", "categorical", "cauchy", "chisquare", "choice",
  "dirichlet", "double_sided_maxwell", "exponential", "f", "gamma", "generalized_normal",
  "geometric", "gumbel", "laplace", "loggamma", "logistic", "lognormal", "maxwell", "multinomial",
  "multivariate_normal", "normal", "orthogonal", "pareto", "permutation", "poisson", "rademacher",
  "randint", "rayleigh", "t", "triangular", "truncated_normal", "uniform", "wald", "weibull_min",
)
INITIALIZERS = (
  "delta_orthogonal", "glorot_normal", "glorot_uniform", "he_normal", "he_uniform",
  "kaiming_normal", "kaiming_uniform", "lecun_normal", "lecun_uniform", "variance_scaling",
  "xavier_normal", "xavier_uniform",
)
# fmt: on
for _name in SAMPLERS:
  setattr(_Samplers, _name, _sampler(getattr(jax.random, _name)))
for _name in INITIALIZERS:
  setattr(_Samplers, _name, _initializer(getattr(jax.nn.initializers, _name)))


class RngStream(Pytree, _Samplers):
  """A stream of random keys: the n-th is `jax.random.fold_in(key, n)`.

  Args:
    key: a seed, or a key of any PRNG implementation; may have a batch shape.
    tag: the name of the stream.

  Raises:
    RngKeyError: `key` is none of these.

  >>> from refax import nnx
  >>> stream = nnx.RngStream(0, tag="noise")
  >>> stream.normal((2,)).shape, int(stream.count)
  ((2,), 1)
  """

  __slots__ = ("_lineage",)
  _is_random: ClassVar[bool] = True
  _lineage: "tuple[_Step, ...] | None"
  """How this stream came about from one that a user made, where that is known; for `reseed`."""

  def __init__(self, key: ArrayLike, *, tag: str):
    key = _as_key(key, tag)
    object.__setattr__(self, "_lineage", ())
    self.tag = tag
    self.key = RngKey(key, tag=tag)
    self.count = RngCount(jnp.zeros(key.shape, jnp.uint32), tag=tag)

  def __call__(self) -> jax.Array:
    """The next key."""
    if not (_jax.no_trace_active() and self.key.is_hijax and self.count.is_hijax):
      key, count = _advance(self.key.get_value(), self.count.get_value())
      self.count.set_value(count)
      return key
    key, count = _advance_now(_peek(self.key), _peek(self.count))  # no copies
    storage.write_ref(self.count.get_raw_value(), count, None, None)
    return key

  def split(self, k: Splits) -> "RngStream":
    """A stream of `k` keys, from the next key of this one: an axis to map over."""
    return self._derived(k)

  def fork(self, *, split: Splits | None = None) -> "RngStream":
    """A stream of its own, from the next key of this one; `split` as in `split(k)`."""
    return self._derived(split)

  def _derived(self, k: Splits | None) -> "RngStream":
    count, before = _concrete(self.count), getattr(self, "_lineage", None)
    step = None if count is None else _Step(count, k)
    key = self()
    new = type(self)(key if k is None else jax.random.split(key, k), tag=self.tag)
    lineage = None if before is None or step is None else (*before, step)
    object.__setattr__(new, "_lineage", lineage)
    return new

  def broadcast(self, k: Splits) -> "RngStream":
    """A stream with the next key of this one, the same `k` times."""
    key = self()
    shape = (k,) if isinstance(k, int) else tuple(k)
    new = type(self)(jnp.broadcast_to(key, shape + key.shape), tag=self.tag)
    object.__setattr__(new, "_lineage", None)
    return new


class Rngs(Pytree, _Samplers):
  """Named random streams; a name that was not given falls back to `default`.

  Args:
    default: the seed or key of the default stream, or a mapping of names to seeds and keys.
    **rngs: the seeds or keys of more streams.

  Raises:
    RngKeyError: something is neither a seed nor a key nor a stream.

  >>> from refax import nnx
  >>> rngs = nnx.Rngs(0, params=1)
  >>> _ = rngs.params(), rngs.dropout(), rngs()      # dropout falls back to default
  >>> int(rngs.params.count), int(rngs.default.count)
  (1, 2)
  >>> rngs.split(8)["params"].key.shape
  (8,)
  """

  _is_random: ClassVar[bool] = True

  def __init__(
    self,
    default: ArrayLike | RngStream | Mapping[str, Any] | None = None,
    /,
    **rngs: ArrayLike | RngStream,
  ):
    if isinstance(default, Mapping):
      rngs = {**default, **rngs}
    elif default is not None:
      rngs = {"default": default, **rngs}
    for tag, key in rngs.items():
      if not isinstance(key, RngStream):
        key = RngStream(key, tag=tag)
      elif key.tag != tag:  # from its next key: no key is used twice
        key = RngStream(key(), tag=tag)
      setattr(self, tag, key)

  def __repr_line__(self, style: Any) -> text.Line | None:
    return None if style.full else text.Line(f"{type(self).__name__}({', '.join(self)})")

  def _stream(self, name: str) -> RngStream:
    streams = self.__dict__
    if name not in streams and "default" not in streams:
      raise MissingRngError.stream(name, sorted(streams))
    return streams.get(name) or streams["default"]

  def __getitem__(self, name: str) -> RngStream:
    return self._stream(name)

  def __getattr__(self, name: str) -> Any:
    if name.startswith("_"):
      raise AttributeError(name)
    return self._stream(name)

  def __call__(self) -> jax.Array:
    """The next key of the default stream."""
    return self._stream("default")()

  def __iter__(self) -> Iterator[str]:
    return iter(self.__dict__)

  def __len__(self) -> int:
    return len(self.__dict__)

  def __contains__(self, name: Any) -> bool:
    return name in self.__dict__

  def items(self) -> Iterator[tuple[str, RngStream]]:
    """(name, stream) of each stream."""
    return iter(self.__dict__.items())

  def _each(self, k: Any, split: Callable, default: Callable) -> "Rngs":
    """New streams: `split(stream, k)` where a filter gives a k, else `default(stream)`."""
    cases = k if isinstance(k, Mapping) else {...: k}
    predicates = [(to_predicate(filter), n) for filter, n in cases.items()]
    streams = {}
    for name, stream in self.items():
      n = next((n for predicate, n in predicates if predicate((name,), stream)), None)
      streams[name] = default(stream) if n is None else split(stream, n)
    return type(self)(streams)

  def split(self, k: Splits | Mapping[Filter, Splits | None]) -> "Rngs":
    """Streams of `k` keys each: an axis to map over.

    Args:
      k: a size or shape for all streams, or one for each filter (None: the same stream).

    >>> from refax import nnx
    >>> rngs = nnx.Rngs(params=0, dropout=1).split({"params": 4, ...: None})
    >>> rngs.params.key.shape, rngs.dropout.key.shape
    ((4,), ())
    """
    return self._each(k, RngStream.split, lambda stream: stream)

  def broadcast(self, k: Splits | Mapping[Filter, Splits | None] | None) -> "Rngs":
    """Streams with one new key each, the same `k` times; `k` as in `split`."""
    return self._each(k, RngStream.broadcast, lambda stream: stream)

  def fork(self, /, *, split: Splits | Mapping[Filter, Splits | None] | None = None) -> "Rngs":
    """Streams of their own, from the next keys of these; `split` as in `split(k)`.

    >>> from refax import nnx
    >>> nnx.Rngs(0).fork(split=8).default.key.shape
    (8,)
    """
    return self._each(split, RngStream.split, RngStream.fork)


def reseed(node: Any, /, policy: Callable | None = None, **streams: ArrayLike | RngStream) -> None:
  """Give the streams in an object new keys, in place, and start them from the beginning.

  Each stream gets the key that it would have in a model that is built with `Rngs(tag=seed)`. Where
  it is not known how a stream came about (the object is a copy, or was built inside a transform),
  the streams of a tag get keys of their own in the order in which they are found.

  Args:
    node: a Module, or any pytree with `RngStream`s.
    policy: `(old, key, path) -> key` where a stream's key has a batch shape and the new one has
      not; by default the key is split to that shape.
    **streams: a seed, key or stream for each tag.

  Raises:
    MissingRngError: there is no stream of a tag. Nothing has changed.
    RngKeyError: something is neither a seed nor a key nor a stream. Nothing has changed.

  >>> from refax import nnx
  >>> model = nnx.Sequential(*(nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=0)) for _ in range(2)))
  >>> nnx.reseed(model, dropout=42)
  >>> model.layers[0].rngs() == model.layers[1].rngs()
  Array(False, dtype=bool)
  """
  found = [(path, x) for path, x in walk_nodes(node) if isinstance(x, RngStream)]
  tags = sorted({stream.tag for _, stream in found})
  for tag in streams:
    if tag not in tags:
      raise MissingRngError.tag(tag, tags)
  roots = {
    tag: None if isinstance(source, RngStream) else _as_key(source, tag)
    for tag, source in streams.items()
  }
  for tag, source in streams.items():
    mine = [(path, stream) for path, stream in found if stream.tag == tag]
    root = roots[tag]
    for (path, stream), lineage in zip(mine, _lineages([x for _, x in mine]), strict=True):
      key = source() if root is None else functools.reduce(lambda k, s: s.key(k), lineage, root)
      if key.shape != stream.key.shape:
        if policy is not None:
          key = policy(stream.key, key, path)
        else:
          key = jax.random.split(key, stream.key.shape)
      stream.key.set_value(key)
      stream.count.set_value(0)


def _lineages(streams: list[RngStream]) -> list[tuple[_Step, ...]]:
  """How each stream came about; where that is unknown or not unique, by its place in the list."""
  known = [lineage for x in streams if (lineage := getattr(x, "_lineage", None)) is not None]
  if len(set(known)) == len(streams):
    return known
  return [(_Step(i),) for i in range(len(streams))] if len(streams) > 1 else [()]

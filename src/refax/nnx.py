from refax.config import *
from refax.config import use_hijax, using_hijax
from refax.core.containers import Dict, List
from refax.core.filters import *
from refax.core.flatten import GraphDef
from refax.core.module import Module
from refax.core.pytree import Pytree, data, is_data, static
from refax.core.variable import BatchStat, Cache, Intermediate, Param, Perturbation, Variable
from refax.graph.inspect import find_duplicates, iter_children, iter_graph, iter_modules, map
from refax.graph.split import clone, graphdef, merge, pop, split, state, update, variables
from refax.graph.state import *
from refax.graph.storage import to_hijax, to_lojax
from refax.rngs import RngCount, RngKey, Rngs, RngState, RngStream, reseed
from refax.transforms.autodiff import DiffState, grad, value_and_grad
from refax.transforms.jit import jit
from refax.train.optimizer import Optimizer, OptState

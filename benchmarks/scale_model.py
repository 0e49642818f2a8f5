"""What a training step takes on many accelerators: arithmetic from bytes, FLOPs and link speeds.

It is a lower bound for a step that hides no communication behind computation (`sum`), and for one
that hides all of it (`most`). What is computed are the formulas whose bytes `benchmarks.scale`
counts in compiled programs.
"""

from typing import NamedTuple


class Chip(NamedTuple):
  """An accelerator, by its data sheet: per second."""

  name: str
  flops: float
  """Of bfloat16 products, without sparsity."""
  inside: float
  """Bytes to others of its node, one direction."""
  outside: float
  """Bytes to other nodes, one direction."""
  node: int
  memory: float


H100 = Chip(
  "H100 SXM, NVLink 4 in a node of 8, 400 Gb/s a GPU outside", 989e12, 450e9, 50e9, 8, 80e9
)


class Job(NamedTuple):
  """A transformer and its batch."""

  parameters: float = 8e9
  layers: int = 32
  features: int = 4096
  length: int = 8192
  sequences: int = 1
  """For each accelerator and, with tensor parallelism, each group of them."""


def step(
  job: Job, chip: Chip, count: int, tensor: int, utilisation: float = 0.5
) -> dict[str, float]:
  """Seconds of a step, and bytes a device.

  Args:
    job: the model and the batch.
    chip: the accelerator.
    count: how many there are.
    tensor: how many of them share each layer; the others divide batch and parameters (FSDP).
    utilisation: of the peak, by the products of one device: what well-written programs reach.
  """
  data = count // tensor
  tokens = job.sequences * job.length  # of one group
  compute = 6 * job.parameters * tokens / tensor / (chip.flops * utilisation)
  # Gathered twice and gradients scattered once, two bytes a number, by groups on other nodes too.
  own = 2 * job.parameters / tensor
  speed = chip.inside if data * tensor <= chip.node else chip.outside
  parameters = 3 * own * (data - 1) / data / speed
  # Four sums of activations a layer, two bytes a number; a sum is twice (n - 1) / n of its bytes.
  sums = 4 * job.layers * 2 * (tensor - 1) / tensor * 2 * tokens * job.features
  activations = sums / chip.inside
  # bfloat16 parameters, float32 copies and two moments: 14 bytes; gradients 2.
  memory = 16 * job.parameters / count
  worst, best = compute + parameters + activations, max(compute, parameters + activations)
  return {
    "compute": compute,
    "parameters": parameters,
    "activations": activations,
    "memory": memory,
    "worst": compute / worst * utilisation,
    "best": compute / best * utilisation,
    "tokens": tokens * data / worst,
  }


def table() -> str:
  """The steps of a job on 8 to 4,096 accelerators, as Markdown."""
  job, chip = Job(), H100
  lines = [
    f"{job.parameters / 1e9:.0f} billion parameters, {job.layers} layers, {job.features} features,",
    f"{job.sequences * job.length:,} tokens for each group; {chip.name}.",
    "",
    "| devices | tensor parallel | compute | parameters | activations | state a device "
    "| FLOPs utilization, nothing hidden to all hidden | tokens a second |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for count in (8, 64, 512, 4096):
    for tensor in (1, 8):
      s = step(job, chip, count, tensor)
      lines.append(
        f"| {count:,} | {tensor} | {s['compute']:.2f} s | {s['parameters']:.2f} s "
        f"| {s['activations']:.2f} s | {s['memory'] / 1e9:.1f} GB "
        f"| {s['worst']:.0%} to {s['best']:.0%} | {s['tokens']:,.0f} |"
      )
  return "\n".join(lines)

"""Roofline lower bound on a program's run time: compute, HBM and interconnect."""

import dataclasses
from typing import Any, Self

import jax

from diffusion_t5x.performance.hlo import Program
from diffusion_t5x.performance.hlo_cost import Cost, ProgramCost
from diffusion_t5x.performance.topology import Chip


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
      arguments: the inputs: state and batch, or parameters and batch.
      outputs: the outputs; `aliased` bytes of them reuse the arguments' memory.
      aliased: see there.
      temporaries: intermediate values.
      peak: maximum of all together.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    peak: int

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> Self:
        found = compiled.memory_analysis()
        assert found is not None  # XLA has it of every program that it compiles
        arguments, outputs = found.argument_size_in_bytes, found.output_size_in_bytes
        aliased, temporaries = found.alias_size_in_bytes, found.temp_size_in_bytes
        return cls(arguments, outputs, aliased, temporaries, arguments + outputs - aliased + temporaries)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Minimum seconds of a chip for compute, memory and interconnect; the longest is the bottleneck.

    Attributes:
      compute: matrix products at the bfloat16 peak.
      hbm: memory traffic at full bandwidth.
      collectives: sent bytes at the bandwidth of all links; a collective over fewer links takes longer.
    """

    compute: float
    hbm: float
    collectives: float

    @classmethod
    def of(cls, cost: Cost, chip: Chip) -> Self:
        return cls(
            compute=cost.flops / chip.flops,
            hbm=cost.hbm_bytes / chip.hbm_bandwidth,
            collectives=sum(cost.sent_bytes.values()) / chip.interconnect_bandwidth,
        )

    @property
    def seconds(self) -> float:
        return max(self.compute, self.hbm, self.collectives)

    @property
    def bottleneck(self) -> str:
        return max(("compute", "hbm", "collectives"), key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Report:
    """Estimated cost of a program on a slice.

    Attributes:
      settings: the compiled settings, by name.
      chip: the slice's chip.
      memory: memory of a device; None if the compiler refused the program for lack of memory.
      refusal: the compiler's message in that case.
      cost: cost on a device.
      lower_seconds: seconds of tracing and lowering.
      compile_seconds: seconds of compilation.
    """

    settings: dict[str, Any]
    chip: Chip
    memory: Memory | None
    refusal: str
    cost: Cost | None
    lower_seconds: float
    compile_seconds: float

    @classmethod
    def of(cls, settings: dict[str, Any], chip: Chip, compiled: jax.stages.Compiled, *seconds: float) -> Self:
        cost = ProgramCost(Program.parse(compiled.as_text() or "")).total()
        return cls(settings, chip, Memory.of(compiled), "", cost, *seconds)

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.memory.peak <= self.chip.hbm_bytes

    def as_json(self) -> dict[str, Any]:
        said = {"settings": self.settings, "chip": dataclasses.asdict(self.chip), "fits": self.fits}
        said |= {"lower_seconds": round(self.lower_seconds, 2), "compile_seconds": round(self.compile_seconds, 2)}
        if self.cost is None or self.memory is None:
            return said | {"refusal": self.refusal}
        roofline = Roofline.of(self.cost, self.chip)
        return said | {
            "memory": dataclasses.asdict(self.memory),
            "flops": self.cost.flops,
            "hbm_bytes": self.cost.hbm_bytes,
            "collectives": [
                {"kind": kind, "devices": devices, "count": count, "sent_bytes": self.cost.sent_bytes[kind, devices]}
                for (kind, devices), count in sorted(self.cost.collectives.items())
            ],
            "loops_of_unknown_length": self.cost.unknown_loops,
            "roofline_seconds": dataclasses.asdict(roofline),
            "bottleneck": roofline.bottleneck,
            "without_reduce_scatter": self._without_reduce_scatter(self.cost),
        }

    def _without_reduce_scatter(self, cost: Cost) -> str | None:
        """Returns a note on gradient sums if the program has no reduce-scatter; None if it has one or sums nothing."""
        kinds = {kind for kind, _ in cost.collectives}
        if "reduce-scatter" in kinds or "all-reduce" not in kinds:
            return None
        if "collective-permute" in kinds:
            return "rings of collective-permute that overlap with the products do most sums, all-reduce the rest"
        return "all-reduce sums what the devices hold in common"

    def __str__(self) -> str:
        lines = [" ".join(f"{name}={value}" for name, value in self.settings.items())]
        if self.cost is None or self.memory is None:
            return "\n".join([*lines, f"  does not fit: {self.refusal}"])
        memory, cost, roofline = self.memory, self.cost, Roofline.of(self.cost, self.chip)
        sent = sum(cost.sent_bytes.values())
        lines += [
            f"  traced and lowered in {self.lower_seconds:.0f} s, compiled in {self.compile_seconds:.0f} s",
            f"  memory: {_gib(memory.peak)} of a chip's {_gib(self.chip.hbm_bytes)}{'' if self.fits else ', too much'}",
            f"    arguments {_gib(memory.arguments)}, temporaries {_gib(memory.temporaries)}, outputs "
            f"{_gib(memory.outputs)} ({_gib(memory.aliased)} in the arguments' place)",
            f"  compute      {roofline.compute:.3g} s: {cost.flops / 1e12:.4g} TFLOP of matrix products",
            f"  hbm          {roofline.hbm:.3g} s: {_gib(cost.hbm_bytes)} read and written",
            f"  collectives  {roofline.collectives:.3g} s: {_gib(sent)} sent",
        ]
        lines += [
            f"    {count} × {kind} among {devices} devices: {_gib(cost.sent_bytes[kind, devices])}"
            for (kind, devices), count in sorted(cost.collectives.items())
        ]
        lines.append(f"  bottleneck: {roofline.bottleneck}, at least {roofline.seconds:.3g} s")
        if how := self._without_reduce_scatter(self.cost):
            lines.append(f"  no reduce-scatter: {how}")
        if cost.unknown_loops:
            lines.append(
                f"  {cost.unknown_loops} loops end depending on the data: each counts as one iteration, so times are "
                "for one iteration"
            )
        return "\n".join(lines)


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"

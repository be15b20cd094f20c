"""The comparison of routes on a language whose truth is known: a second-order Markov chain of 12 symbols.

An autoregressive model learns the chain from texts. Students start from it by three routes, in place and shifted, cold
and warmed (a short off-policy distillation first, the same for all three). They write 16 symbols after 4, and the chain
itself says what each symbol costs.

    sft            the mean cross-entropy of masked tokens of the data (objectives/block_sft.gin)
    off_policy     the start's distributions on the data, under random masks
    opdlm          the same on the student's own texts, in the states of its own decoding
"""

import argparse
import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence

import conversion_chain_report
import jax
import numpy as np
from conversion_report import Score
from conversion_verbs import run, settings
from markov_chain import Chain

from diffusion_t5x import partitioning, train
from diffusion_t5x.checkpointing import merging
from diffusion_t5x.checkpointing.checkpoints import find_checkpoint
from diffusion_t5x.checkpointing.start import model_settings
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.plain_vocabularies import TokenIdVocabulary
from diffusion_t5x.data.vocabularies import token_ids
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.evaluation.inference import make_decode_step
from diffusion_t5x.evaluation.loading import load_model
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.objectives.block_sft import BlockSft
from diffusion_t5x.objectives.distillation import Distillation
from diffusion_t5x.performance.step_flops import rollout_flops, step_flops
from diffusion_t5x.training.ramps import Ramp
from diffusion_t5x.training.rollout import Rollout

BLOCK_SIZE, BATCH_SIZE = 4, 16
NUM_INPUTS, NUM_TARGETS = 4, 16  # TASK_FEATURE_LENGTHS of recipes/conversion/chain_common.gin
PAD_ID, EOS_ID, FIRST_SYMBOL = 0, 1, 2
START_STEPS = 1000  # TRAIN_STEPS of recipes/conversion/chain_start.gin
NUM_TEXTS = {"train": 16_384, "validation": 512, "test": 512}
RATES = (2e-3, 6e-3)
TUNING_SEED = 100
ROUTES = {
    "sft": ["--gin_file=objectives/block_sft.gin", "--gin.ROLLOUT=None"],
    "off_policy": ['--gin.STATES="random"', "--gin.ROLLOUT=None"],
    "opdlm": [],
}
STEPS: Mapping[str, tuple[int | None, float | None]] = {
    "4 steps": (4, None),
    "2 steps": (2, None),
    "1 step": (1, None),
    "threshold 0.9": (None, 0.9),
}
TEMPERATURES = (1.0, 0.0)
ONE_BY_ONE = "one by one"


def decoding(steps: str, temperature: float) -> str:
    """Returns the name of a decoding setting."""
    return f"{steps}, T = {temperature:g}"


def decoders() -> dict[str, Decoder]:
    """Returns the students' decoders by name. A text never ends."""

    def blocks(num_steps: int | None, threshold: float | None, temperature: float) -> BlockDecoder:
        inner = MaskedDecoder(num_steps, threshold=threshold, temperature=temperature, ends="never")
        return BlockDecoder(BLOCK_SIZE, inner)

    return {decoding(name, t): blocks(*how, t) for t in TEMPERATURES for name, how in STEPS.items()}


@dataclasses.dataclass(frozen=True, order=True)
class Student:
    """One student: its route, how it reads (in place or shifted), its start (cold or warmed), and its seed."""

    route: str
    shifted: bool
    warmed: bool
    seed: int

    @property
    def kind(self) -> str:
        """The name that it shares with the students of other seeds."""
        return conversion_chain_report.kind(self.route, self.shifted, self.warmed)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All runs in one folder; each is done once.

    Attributes:
      output: the folder.
      steps: training steps of each route; a warm-up has half as many.
      overrides: flags for all training.
    """

    output: pathlib.Path
    steps: int
    overrides: tuple[str, ...] = ()

    @functools.cached_property
    def chain(self) -> Chain:
        return Chain.draw()

    @property
    def start(self) -> pathlib.Path:
        return self.output / "start"

    @property
    def warm_steps(self) -> int:
        return self.steps // 2

    @functools.cached_property
    def model(self) -> ModelConfig:
        """The config of the start."""
        found = model_settings(merging.leaves(find_checkpoint(str(self.start))))
        return ModelConfig(**found, dtype="float32", scan_unroll=1)

    def texts(self, split: str) -> np.ndarray:
        """Returns the ids of a split's texts, `[texts, NUM_INPUTS + NUM_TARGETS]`."""
        seed = list(NUM_TEXTS).index(split)
        return self.chain.sample(NUM_TEXTS[split], NUM_INPUTS + NUM_TARGETS, seed) + FIRST_SYMBOL

    def _file(self, split: str) -> pathlib.Path:
        return self.output / f"{split}.jsonl"

    def prepare(self) -> None:
        """Writes the texts, and trains the start on them."""
        for split in ("train", "validation"):
            rows = self.texts(split).tolist()
            lines = (json.dumps({"inputs": row[:NUM_INPUTS], "targets": row[NUM_INPUTS:]}) for row in rows)
            self._file(split).write_text("\n".join(lines) + "\n", encoding="utf-8")
        self._train(self.start, START_STEPS, ["--gin_file=recipes/conversion/chain_start.gin"])

    def _train(self, model_dir: pathlib.Path, steps: int, flags: Sequence[str]) -> None:
        if (model_dir / "checkpoints" / f"checkpoint_{steps}").exists():
            return
        files = settings(PROMPTS_FILE=self._file("train"), VALIDATION_FILE=self._file("validation"))
        places = settings(MODEL_DIR=model_dir)
        run(train.train, [*flags, *files, *places, *self.overrides, *settings(TRAIN_STEPS=steps)])

    def train(self, student: Student, rate: float, warm_rate: float) -> pathlib.Path:
        """Trains a student, and what warms it; returns its folder."""
        start = self.start
        if student.warmed:
            warmer = dataclasses.replace(student, route="off_policy", warmed=False)
            start = self.output / "warmed" / f"{'shifted' if student.shifted else 'in_place'}_{student.seed}"
            self._train_student(warmer, start, self.start, self.warm_steps, warm_rate)
        name = student.kind.replace(", ", "_").replace(" ", "_")
        model_dir = self.output / "students" / f"{name}_{student.seed}_{rate:g}"
        self._train_student(student, model_dir, start, self.steps, rate)
        return model_dir

    def _train_student(
        self, student: Student, model_dir: pathlib.Path, start: pathlib.Path, steps: int, rate: float
    ) -> None:
        flags = ["--gin_file=recipes/conversion/chain.gin", *ROUTES[student.route]]
        flags += ["--gin_file=adaptation/shifted.gin"] if student.shifted else []
        places = settings(INITIAL_CHECKPOINT_PATH=start, TEACHER_CHECKPOINT_PATH=self.start)
        self._train(model_dir, steps, [*flags, *places, *settings(LEARNING_RATE=rate, RANDOM_SEED=student.seed)])

    @functools.cache  # noqa: B019  (one comparison a process)
    def _steps(self, shifted: bool, autoregressive: bool = False) -> dict[str, jax.stages.Wrapped]:
        """Returns compiled decoders by name: of students of all kinds that read alike, the same programs."""
        one_by_one = {decoding(ONE_BY_ONE, t): AutoregressiveDecoder(temperature=t) for t in TEMPERATURES}
        chosen: Mapping[str, Decoder] = one_by_one if autoregressive else decoders()
        definition, _ = self._load(self.start, shifted)
        return {name: make_decode_step(self._mesh, definition, each, seed=0) for name, each in chosen.items()}

    @functools.cached_property
    def _mesh(self) -> jax.sharding.Mesh:
        return partitioning.MeshConfig().make()

    def _load(self, model_dir: pathlib.Path, shifted: bool) -> tuple:
        vocabulary = token_ids(TokenIdVocabulary(FIRST_SYMBOL + len(self.chain.next_symbol), EOS_ID, PAD_ID))
        config = dataclasses.replace(self.model, shifted=shifted)
        return load_model(str(model_dir), config, vocabulary, self._mesh)

    def scores(
        self, model_dir: pathlib.Path, split: str, route: str, seed: int, shifted: bool, autoregressive: bool = False
    ) -> list[Score]:
        """Returns nats per token under the chain, and tokens per pass, for each decoder."""
        file = model_dir / f"scores_{split}.json"
        if not file.exists():
            _, params = self._load(model_dir, shifted)
            prompts = _prompts(self.texts(split)[:, :NUM_INPUTS])
            steps = self._steps(shifted, autoregressive)
            found = {name: self._score(step, params, prompts, seed) for name, step in steps.items()}
            file.write_text(json.dumps(found, indent=1), encoding="utf-8")
        found = json.loads(file.read_text(encoding="utf-8"))
        return [Score(route, seed, decoder, metrics) for decoder, metrics in found.items()]

    def _score(self, step: jax.stages.Wrapped, params: object, prompts: Batch, seed: int) -> dict[str, float]:
        with jax.set_mesh(self._mesh):
            decoded = jax.device_get(step(params, partitioning.put_batch(self._mesh, prompts), np.int32(seed)))
        symbols = decoded.tokens - FIRST_SYMBOL
        whole = (symbols >= 0).all(axis=-1)  # an autoregressive decoder may end a text, rarely
        return {
            "nats": float(self.chain.nats(symbols[whole], NUM_INPUTS).mean()),
            "tokens_per_step": float(decoded.num_tokens.sum() / decoded.row_steps.sum()),
        }

    def tune(self, routes: Sequence[str]) -> dict[tuple[str, bool], dict[float, float]]:
        """Returns for each route and reading the mean nats over all decoders, by learning rate: another seed, cold."""
        found: dict[tuple[str, bool], dict[float, float]] = {}
        for route in dict.fromkeys([*routes, "off_policy"]):
            for shifted in (False, True):
                student = Student(route, shifted, False, TUNING_SEED)
                for rate in RATES:
                    model_dir = self.train(student, rate, rate)
                    scores = self.scores(model_dir, "validation", student.kind, student.seed, shifted)
                    mean = float(np.mean([score.metrics["nats"] for score in scores]))
                    found.setdefault((route, shifted), {})[rate] = mean
        return found

    def cost(self, student: Student) -> tuple[float, float]:
        """Returns tokens read and FLOPs of a student's training, with its warm-up, by formula."""
        objective = BlockSft(BLOCK_SIZE) if student.route == "sft" else Distillation(BLOCK_SIZE)
        row = NUM_INPUTS + NUM_TARGETS
        flops = self.steps * step_flops(self.model, objective, BATCH_SIZE, row)
        if student.route == "opdlm":
            rollout = Rollout(
                BlockDecoder(BLOCK_SIZE, MaskedDecoder(num_steps=4)), lengths=Ramp(NUM_TARGETS, NUM_TARGETS)
            )
            flops += self.steps * rollout_flops(self.model, rollout, BATCH_SIZE, NUM_INPUTS, 0)
        warming = self.warm_steps if student.warmed else 0
        flops += warming * step_flops(self.model, Distillation(BLOCK_SIZE), BATCH_SIZE, row)
        return float((self.steps + warming) * BATCH_SIZE * row), float(flops)


def _prompts(inputs: np.ndarray) -> Batch:
    num, given = inputs.shape
    slots = np.broadcast_to(np.arange(given + NUM_TARGETS, dtype=np.int32), (num, given + NUM_TARGETS))
    return Batch(
        tokens=np.pad(inputs.astype(np.int32), ((0, 0), (0, NUM_TARGETS))),
        target_mask=slots >= given,
        segment_ids=np.ones_like(slots),
        positions=slots,
        example_ids=np.arange(num, dtype=np.int32),
    )


def compare(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Runs what is missing of the comparison, and writes the report after each seed."""
    comparison = Comparison(args.output, args.steps, tuple(overrides))
    comparison.prepare()
    scores = comparison.scores(comparison.start, args.split, "the start itself", 0, False, autoregressive=True)
    routes = args.routes or list(ROUTES)
    rates = comparison.tune(routes)
    best = {kind: min(found, key=lambda rate: found[rate]) for kind, found in rates.items()}
    costs: dict[str, tuple[float, float]] = {}
    for seed in args.seeds:
        for shifted in (False, True):
            for warmed in (False, True):
                for route in routes:
                    student = Student(route, shifted, warmed, seed)
                    model_dir = comparison.train(student, best[route, shifted], best["off_policy", shifted])
                    scores += comparison.scores(model_dir, args.split, student.kind, seed, shifted)
                    costs[student.kind] = comparison.cost(student)
        text = conversion_chain_report.report(
            comparison.chain.entropy_rate, scores, costs, rates, args.budget, args.tokens_per_pass
        )
        (args.output / "report.md").write_text(text, encoding="utf-8")

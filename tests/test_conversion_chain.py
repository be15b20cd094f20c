"""The comparison on a Markov chain: its truth, its plan, its report, and the advice on routes."""

import itertools
import pathlib
import sys
import types

import numpy as np
import pytest

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
ALL = ["sft", "off_policy", "opdlm"]


@pytest.fixture
def launch(monkeypatch):
    """The modules of launch/ under test."""
    monkeypatch.syspath_prepend(str(LAUNCH))
    import conversion
    import conversion_chain
    import conversion_chain_report
    import markov_chain
    import route_advisor

    return types.SimpleNamespace(
        main=conversion,
        comparison=conversion_chain,
        report=conversion_chain_report,
        chain=markov_chain,
        advisor=route_advisor,
    )


def text_probabilities(chain, length):
    """Every text's probability, `[symbols] * length`: from the stationary pairs, symbol by symbol."""
    found = chain.pairs
    for place in range(2, length):
        letters = "abcdefgh"[: place + 1]
        found = np.einsum(f"{letters[:-1]},{letters[-3:]}->{letters}", found, chain.next_symbol)
    return found


def test_the_entropy_rate_is_what_another_symbol_adds(launch):
    chain = launch.chain.Chain.draw(seed=1, num_symbols=3)
    np.testing.assert_allclose(chain.next_symbol.sum(axis=-1), 1)
    assert chain.next_symbol.min() >= 0.02 / 3
    pairs = np.full((3, 3), 1 / 9)
    for _ in range(2000):
        pairs = np.einsum("ij,ijk->jk", pairs, chain.next_symbol)
    np.testing.assert_allclose(chain.pairs, pairs, atol=1e-12)
    entropies = []
    for length in (5, 6):
        chances = text_probabilities(chain, length)
        assert chances.sum() == pytest.approx(1)
        entropies.append(-np.sum(chances * np.log(chances)))
    assert chain.entropy_rate == pytest.approx(entropies[1] - entropies[0], rel=1e-9)


def test_nats_of_texts_by_hand(launch):
    table = np.array([[[0.25, 0.75], [0.5, 0.5]], [[0.125, 0.875], [0.9, 0.1]]])
    chain = launch.chain.Chain(table)
    found = chain.nats(np.array([[0, 0, 1, 1, 0], [1, 0, 0, 0, 0]]), given=2)
    expected = [-np.log([0.75, 0.5, 0.9]).mean(), -np.log([0.125, 0.25, 0.25]).mean()]
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(chain.nats(np.array([[0, 0, 1, 1, 0]]), given=4), -np.log(0.9))


def test_texts_are_the_chain_s_and_the_same_each_time(launch):
    chain = launch.chain.Chain.draw()
    assert chain.entropy_rate == pytest.approx(1.0333, abs=1e-4)  # what docs/distillation.md says
    two_places_on = np.einsum("ijk,jkl->ijl", chain.next_symbol, chain.next_symbol)
    assert two_places_on.max() == pytest.approx(0.861, abs=1e-3)  # likewise: below the threshold of 0.9
    assert -np.log(chain.next_symbol).mean() == pytest.approx(4.71, abs=5e-3)  # likewise: of uniform symbols
    texts = chain.sample(20_000, 12, seed=0)
    np.testing.assert_array_equal(texts, chain.sample(20_000, 12, seed=0))
    assert (texts != chain.sample(20_000, 12, seed=1)).any()
    nats = chain.nats(texts, given=2)
    assert abs(nats.mean() - chain.entropy_rate) < 4 * nats.std() / len(nats) ** 0.5
    for place in (0, 10):  # stationary: the last pair is distributed as the first
        counts = np.bincount(texts[:, place] * 12 + texts[:, place + 1], minlength=144)
        error = np.sqrt(chain.pairs.ravel() * len(texts))
        assert np.abs(counts - chain.pairs.ravel() * len(texts)).max() < 5 * error.max()


def candidate(launch, route, decoder, cost, speed, *values):
    return launch.advisor.Candidate(route, decoder, cost, speed, dict(enumerate(values)))


@pytest.fixture
def measured(launch):
    """Three routes with hand-made nats. By paired differences slow and dear: -1.0 ± 0.0; slow and cheap: not apart."""
    return [
        candidate(launch, "cheap", "4 steps", 1.0, 0.8, 2.0, 3.0, 4.0),
        candidate(launch, "cheap", "2 steps", 1.0, 1.33, 5.0, 6.0, 7.0),
        candidate(launch, "middling", "4 steps", 2.0, 0.8, 2.5, 2.5, 3.0),
        candidate(launch, "dear", "4 steps", 3.0, 0.8, 1.0, 2.0, 3.0),
        candidate(launch, "dear", "2 steps", 3.0, 1.33, 5.5, 5.5, 6.5),
    ]


def test_advice_keeps_to_budget_and_speed(launch, measured):
    def advise(budget, speed):
        found = launch.advisor.advise(measured, budget, speed, lower_is_better=True)
        return found and (found.best.route, found.best.decoder, [x.route for x in found.alike])

    assert advise(0.5, 0.5) is None
    assert advise(9, 2) is None
    assert advise(1, 0.8) == ("cheap", "4 steps", [])
    assert advise(2, 0.8) == ("middling", "4 steps", ["cheap"])  # differences -0.5, 0.5, 1.0
    assert advise(3, 0.8) == ("dear", "4 steps", ["middling"])  # from cheap -1 in each seed: told apart
    assert advise(3, 1.0) == ("dear", "2 steps", ["cheap"])
    found = launch.advisor.advise(measured, 3, 0, lower_is_better=False)
    assert (found.best.route, found.best.mean) == ("cheap", 6.0)


def test_one_seed_tells_nothing_apart(launch):
    both = [candidate(launch, "a", "x", 1.0, 1.0, 1.0), candidate(launch, "b", "x", 1.0, 1.0, 9.0)]
    assert [x.route for x in launch.advisor.advise(both, 1, 1, lower_is_better=True).alike] == ["b"]


def test_the_table_of_advice_names_each_change(launch, measured):
    lines = launch.advisor.table(measured, lower_is_better=True).splitlines()[2:]
    assert [line.split(" | ")[:4] for line in lines] == [
        ["| 0.8", "1", "cheap", "4 steps"],
        ["| 0.8", "2", "middling", "4 steps"],
        ["| 0.8", "3", "dear", "4 steps"],
        ["| 1.3", "1", "cheap", "2 steps"],
        ["| 1.3", "3", "dear", "2 steps"],
    ]
    assert lines[2].endswith("| 2.000 ± 2.484 | middling (2.667 ± 0.717) |")
    asked = launch.advisor.table(measured, lower_is_better=True, budget=2.5, tokens_per_pass=1.0)
    assert asked.splitlines()[2:] == ["| 1 | 2.5 | cheap | 2 steps | 6.000 ± 2.484 | none |"]
    none = launch.advisor.table(measured, lower_is_better=True, budget=0.5)
    assert none.splitlines()[2] == "| 0.8 | 0.5 | none |  |  |  |"


def test_the_report_says_which_route_is_ahead_in_how_many_seeds(launch):
    nats = {"sft": (3.0, 3.0, 3.0), "off_policy": (2.0, 2.5, 3.5), "opdlm": (1.0, 1.5, 2.5)}
    scores = [launch.comparison.Score("the start itself", 0, "one by one, T = 1", {"nats": 1.1, "tokens_per_step": 1})]
    costs = {}
    for route, values in nats.items():
        kind = launch.report.kind(route, False, True)
        costs[kind] = (2e5, 4e10)
        for (seed, value), t in itertools.product(enumerate(values), ("T = 1", "T = 0")):
            scores.append(
                launch.comparison.Score(kind, seed, f"2 steps, {t}", {"nats": value, "tokens_per_step": 4 / 3})
            )
    rates = {("sft", False): {1e-3: 3.2, 3e-3: 3.1}}
    text = launch.report.report(1.0, scores, costs, rates)
    assert "The autoregressive start writes, one by one, T = 1: 1.100." in text
    assert "| opdlm, in place, warmed | 1.667 ± 1.897 | 0.200 | 0.040 |" in text
    assert "| opdlm − off_policy | in place | warmed | -1.000 ± 0.000 (3 of 3) * |" in text
    assert "| off_policy − sft | in place | warmed | -0.333 ± 1.897 (2 of 3) |" in text
    assert "| sft | in place | 3.200 | **3.100** |" in text
    assert (
        "| 1.3 | 0.04 | opdlm, in place, warmed | 2 steps | 1.667 ± 1.897 | sft, in place, warmed (3.000 ± 0.000) |"
        in text
    )


@pytest.fixture
def planned(launch, tmp_path, monkeypatch):
    """Runs the command with training and decoding left out; returns the flags of each training."""
    runs = []

    def run(verb, flags):
        named = dict(flag.removeprefix("--gin.").split("=", 1) for flag in flags if flag.startswith("--gin."))
        runs.append(flags)
        (pathlib.Path(named["MODEL_DIR"]) / "checkpoints" / f"checkpoint_{named['TRAIN_STEPS']}").mkdir(parents=True)

    def scores(self, model_dir, split, route, seed, shifted, autoregressive=False):
        better = 1.0 if model_dir.name.endswith("_0.006") == (route.startswith("sft") or shifted) else 2.0
        names = launch.comparison.decoders() if not autoregressive else ["one by one, T = 1"]
        found = {"nats": better + seed / 10, "tokens_per_step": 0.8}
        return [launch.comparison.Score(route, seed, name, found) for name in names]

    monkeypatch.setattr(launch.comparison, "run", run)
    monkeypatch.setattr(launch.comparison.Comparison, "scores", scores)
    monkeypatch.setattr(launch.comparison.Comparison, "cost", lambda self, student: (1e5, 1e10))
    monkeypatch.setattr(launch.comparison, "NUM_TEXTS", {"train": 8, "validation": 2, "test": 2})

    def call(*flags):
        runs.clear()
        monkeypatch.setattr(sys, "argv", ["conversion.py", "chain", "--output", str(tmp_path), *flags])
        launch.main.main()
        return list(runs)

    return call


def test_the_plan(planned, launch, tmp_path):
    runs = planned("--seeds", "0", "1", "--steps", "40")
    of = [" ".join(flags) for flags in runs]
    tuned = [flags for flags in of if "RANDOM_SEED=100" in flags]
    assert len(tuned) == 3 * 2 * len(launch.comparison.RATES)
    assert not any("/warmed/" in flags for flags in tuned)
    warmed = [flags for flags in of if "MODEL_DIR" in flags and f"MODEL_DIR={tmp_path}/warmed/" in flags]
    assert len(warmed) == 2 * 2 and all("TRAIN_STEPS=20" in flags for flags in warmed)  # shared by all routes
    assert all('STATES="random"' in flags and "ROLLOUT=None" in flags for flags in warmed)
    assert len(of) == 1 + len(tuned) + len(warmed) + 2 * 12
    last = [flags for flags in of if "RANDOM_SEED=1 " in f"{flags} " and "TRAIN_STEPS=40" in flags]
    assert sum("objectives/block_sft.gin" in flags for flags in last) == 4
    # The rates of the fixture's best scores: the higher one for SFT, and for whatever is shifted.
    for flags in last:
        higher = "block_sft" in flags or "shifted.gin" in flags
        assert f"LEARNING_RATE={0.006 if higher else 0.002} " in f"{flags} "
        assert f"TEACHER_CHECKPOINT_PATH={tmp_path}/start" in flags
    assert planned("--seeds", "0", "1", "--steps", "40") == []
    assert "opdlm, shifted, warmed" in (tmp_path / "report.md").read_text()


def test_a_route_of_another_ground_is_refused(planned, capsys):
    with pytest.raises(SystemExit):
        planned("--routes", "annealed")
    assert "chain has no route annealed" in capsys.readouterr().err


def test_a_start_that_was_stopped_goes_on(planned, tmp_path):
    (tmp_path / "start" / "checkpoints" / "checkpoint_7").mkdir(parents=True)
    assert f"--gin.MODEL_DIR={tmp_path}/start" in planned("--seeds", "0", "--steps", "40")[0]


def test_a_folder_holds_one_comparison(planned, tmp_path, capsys):
    assert planned("--routes", "sft", "--seeds", "0", "--steps", "40")
    assert planned("--routes", "opdlm", "--seeds", "0", "--steps", "40")
    for flags, message in (
        (["--steps", "80"], f"{tmp_path} holds a comparison with steps = 40, not 80. Name another --output."),
        (["--steps", "40", "--gin.BATCH_SIZE=4"], "overrides = [], not ['--gin.BATCH_SIZE=4']"),
    ):
        with pytest.raises(SystemExit):
            planned("--routes", "sft", "--seeds", "0", *flags)
        assert message in capsys.readouterr().err


def test_what_students_cost(launch, tmp_path):
    comparison = launch.comparison.Comparison(tmp_path, 40)
    sizes = {"embed_dim": 48, "num_layers": 2, "num_heads": 2, "head_dim": 24, "mlp_dim": 96, "vocab_size": 16}
    comparison.__dict__["model"] = launch.comparison.ModelConfig(**sizes)
    cost = {
        (route, warmed): comparison.cost(launch.comparison.Student(route, False, warmed, 0))
        for route in ALL
        for warmed in (False, True)
    }
    assert cost["sft", False][0] == 40 * 16 * 20 and cost["sft", True][0] == 60 * 16 * 20
    assert cost["sft", False][1] < cost["off_policy", False][1] < cost["opdlm", False][1]
    for route in ALL:  # the same warm-up, half as many steps of distillation
        warming = cost[route, True][1] - cost[route, False][1]
        assert warming == pytest.approx(cost["off_policy", False][1] / 2)


@pytest.mark.slow
def test_the_comparison_runs(launch, tmp_path, monkeypatch):
    monkeypatch.setattr(launch.comparison, "RATES", (1e-3,))
    monkeypatch.setattr(launch.comparison, "NUM_TEXTS", {"train": 640, "validation": 8, "test": 8})
    monkeypatch.setattr(launch.comparison, "STEPS", {"2 steps": (2, None)})
    monkeypatch.setattr(launch.comparison, "START_STEPS", 4)
    command = ["conversion.py", "chain", "--output", str(tmp_path), "--seeds", "0", "--steps", "4", "--routes", "opdlm"]
    monkeypatch.setattr(sys, "argv", [*command, "--gin.ModelConfig.embed_dim=16"])
    launch.main.main()
    text = (tmp_path / "report.md").read_text()
    assert "The chain's entropy rate is 1.0333 nats" in text
    for shifted, warmed in itertools.product((False, True), repeat=2):
        assert f"| {launch.report.kind('opdlm', shifted, warmed)} | " in text

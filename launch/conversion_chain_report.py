"""The report on the chain's comparison: nats under the truth, the order of the routes, the rates tried, advice."""

from collections.abc import Mapping, Sequence

import route_advisor
from conversion_report import Score
from intervals import differences, interval, shown
from route_advisor import Candidate

PAIRS = (("opdlm", "off_policy"), ("off_policy", "sft"), ("opdlm", "sft"))
READINGS, STARTS = {False: "in place", True: "shifted"}, {False: "cold", True: "warmed"}


def kind(route: str, shifted: bool, warmed: bool) -> str:
    """The name of a kind of students."""
    return f"{route}, {READINGS[shifted]}, {STARTS[warmed]}"


def report(
    entropy_rate: float,
    scores: Sequence[Score],
    costs: Mapping[str, tuple[float, float]],
    rates: Mapping[tuple[str, bool], Mapping[float, float]],
    budget: float | None = None,
    tokens_per_pass: float | None = None,
) -> str:
    """Returns the report in Markdown.

    Args:
      entropy_rate: nats per symbol of the chain's own texts.
      scores: of the start and of all students, with metrics "nats" and "tokens_per_step".
      costs: tokens read and FLOPs by kind of student.
      rates: by route and reading, the mean nats of each learning rate tried.
      budget, tokens_per_pass: as `route_advisor.table` takes them.
    """
    by_kind = _by(scores, "nats")
    passes = _by(scores, "tokens_per_step")
    start = {decoder: values for (name, decoder), values in by_kind.items() if name not in costs}
    own = "; ".join(f"{decoder}: {shown(list(values.values()))}" for decoder, values in start.items())
    parts = [
        f"The chain's entropy rate is {entropy_rate:.4f} nats per symbol. The autoregressive start writes, {own}.\n"
    ]
    for temperature in ("T = 1", "T = 0"):
        suffix = f", {temperature}"
        chosen, speeds = (
            {(k, d.removesuffix(suffix)): v for (k, d), v in found.items() if k in costs and d.endswith(suffix)}
            for found in (by_kind, passes)
        )
        names = list(dict.fromkeys(d for _, d in chosen))
        parts.append(f"## Nats per symbol under the chain, {temperature}\n\n" + _students(chosen, speeds, costs, names))
        parts.append(f"## Differences, {temperature}\n\n" + _orders(chosen, names))
        found = [Candidate(k, d, costs[k][1] / 1e12, _mean(speeds[k, d]), values) for (k, d), values in chosen.items()]
        advice = route_advisor.table(found, lower_is_better=True, budget=budget, tokens_per_pass=tokens_per_pass)
        parts.append(f"## Which route to take, {temperature}\n\n{advice}")
    parts.append("## Learning rates\n\n" + _rates(rates))
    return "\n".join(parts)


def _students(
    nats: Mapping[tuple[str, str], Mapping[int, float]],
    passes: Mapping[tuple[str, str], Mapping[int, float]],
    costs: Mapping[str, tuple[float, float]],
    decoders: Sequence[str],
) -> str:
    speeds = "; ".join(
        f"{d}: {min(v):.2f}" + (f" to {max(v):.2f}" if max(v) - min(v) > 0.005 else "")
        for d in decoders
        for v in [[_mean(values) for (_, name), values in passes.items() if name == d]]
    )
    rows = [
        [name, *(shown(list(nats[name, d].values())) for d in decoders), f"{tokens / 1e6:.3f}", f"{flops / 1e12:.3f}"]
        for name, (tokens, flops) in costs.items()
    ]
    table = _table(["student", *decoders, "million tokens", "TFLOP"], rows)
    return f"{table}\nTokens per pass. {speeds}.\n"


def _orders(nats: Mapping[tuple[str, str], Mapping[int, float]], decoders: Sequence[str]) -> str:
    """Differences between routes, paired by seed; negative: the first has fewer nats."""
    rows = []
    for first, second in PAIRS:
        for shifted in READINGS:
            for warmed in STARTS:
                cells = []
                for decoder in decoders:
                    pair = [nats.get((kind(route, shifted, warmed), decoder), {}) for route in (first, second)]
                    if found := differences(*pair):
                        fewer = sum(x < 0 for x in found)
                        _, low, high = interval(found)
                        sure = "" if low <= 0 <= high or len(found) < 2 else " *"
                        cells.append(f"{shown(found)} ({fewer} of {len(found)}){sure}")
                if cells:
                    rows.append([f"{first} − {second}", READINGS[shifted], STARTS[warmed], *cells])
    table = _table(["difference", "reading", "start", *decoders], rows, left=3)
    return f"{table}\nIn brackets: seeds in which the first route has fewer nats. *: the interval excludes 0.\n"


def _rates(rates: Mapping[tuple[str, bool], Mapping[float, float]]) -> str:
    """Mean nats over all decoders, on another seed and other prompts; the chosen rate in bold."""
    columns = list(next(iter(rates.values())))
    rows = []
    for (route, shifted), found in rates.items():
        best = min(found, key=lambda rate: found[rate])
        cells = [f"**{found[rate]:.3f}**" if rate == best else f"{found[rate]:.3f}" for rate in columns]
        rows.append([route, READINGS[shifted], *cells])
    return _table(["route", "reading", *(f"{rate:g}" for rate in columns)], rows, left=2)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _by(scores: Sequence[Score], metric: str) -> dict[tuple[str, str], dict[int, float]]:
    found: dict[tuple[str, str], dict[int, float]] = {}
    for score in scores:
        found.setdefault((score.route, score.decoder), {})[score.seed] = score.metrics[metric]
    return found


def _mean(values: Mapping[int, float]) -> float:
    return sum(values.values()) / len(values)

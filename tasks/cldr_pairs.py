"""English to French dates, times, numbers, currencies, units and names, from CLDR (through Babel).

The pairs are drawn once with a fixed seed. An English string with two different translations is left out, so French is
a function of English. The split is by a stable hash of the English string: no test string occurs in training, though
its parts do.
"""

import dataclasses
import datetime
import decimal
import functools
import hashlib
import random
from collections.abc import Callable
from typing import Literal

from babel import Locale, dates, lists, numbers, units

SEED = 20_240_229
VALIDATION_PERCENT, TEST_PERCENT = 2, 5
LONGEST = 36  # characters; the quickstart vocabulary writes no longer text in more than 24 tokens, EOS included

# A draw is a function of the locale: the same date or amount, written in either language.
Draw = Callable[[Locale], str]

# fmt: off
_CURRENCIES = (
    "USD", "EUR", "GBP", "JPY", "CHF", "CAD", "AUD", "INR", "CNY", "BRL", "MXN", "SEK", "NOK", "DKK", "PLN",
    "CZK", "TRY", "ZAR", "KRW", "NZD",
)
_UNITS = (
    "length-kilometer", "length-meter", "length-centimeter", "length-millimeter", "length-mile", "length-foot",
    "length-inch", "length-yard", "mass-tonne", "mass-kilogram", "mass-gram", "mass-pound", "mass-ounce",
    "volume-liter", "volume-milliliter", "volume-gallon", "area-hectare", "area-square-kilometer",
    "area-square-meter", "area-acre", "area-square-mile", "temperature-celsius", "temperature-fahrenheit",
    "speed-kilometer-per-hour", "speed-mile-per-hour", "speed-meter-per-second", "speed-knot", "digital-byte",
    "digital-kilobyte", "digital-megabyte", "digital-gigabyte", "digital-terabyte", "duration-year",
    "duration-month", "duration-week", "duration-day", "duration-hour", "duration-minute", "duration-second",
    "energy-kilocalorie", "energy-kilowatt-hour", "power-watt", "power-kilowatt", "power-horsepower",
    "frequency-hertz", "frequency-megahertz", "electric-volt", "electric-ampere", "pressure-bar",
    "pressure-hectopascal", "angle-degree", "graphics-pixel", "light-lux",
)
# fmt: on
_NO_TERRITORIES = frozenset({"QO", "XA", "XB", "ZZ"})  # the remainder of Oceania, two test locales, "unknown"


@dataclasses.dataclass(frozen=True)
class Pair:
    english: str
    french: str
    kind: str


@functools.cache
def pairs(split: str) -> tuple[Pair, ...]:
    """Returns the pairs of 'train', 'validation' or 'test', ordered by hash, so that any first n are a fair sample."""
    return _all_pairs()[split]


def split_of(english: str) -> str:
    """Returns the split of an English string."""
    bucket = int.from_bytes(_digest(english)[:8], "big") % 100
    if bucket < TEST_PERCENT:
        return "test"
    return "validation" if bucket < TEST_PERCENT + VALIDATION_PERCENT else "train"


def _digest(english: str) -> bytes:
    return hashlib.sha256(english.encode()).digest()


@functools.cache
def _all_pairs() -> dict[str, tuple[Pair, ...]]:
    rng = random.Random(SEED)
    english, french = Locale("en"), Locale("fr")
    found: dict[str, Pair] = {}
    ambiguous = set()
    for kind, (draws, draw) in _KINDS.items():
        for _ in range(draws):
            write = draw(rng)
            pair = Pair(write(english), write(french), kind)
            if max(len(pair.english), len(pair.french)) > LONGEST:
                continue
            if found.setdefault(pair.english, pair).french != pair.french:
                ambiguous.add(pair.english)
    splits: dict[str, list[Pair]] = {"train": [], "validation": [], "test": []}
    for text in sorted(found.keys() - ambiguous, key=_digest):
        splits[split_of(text)].append(found[text])
    return {split: tuple(content) for split, content in splits.items()}


def _moment(rng: random.Random) -> datetime.datetime:
    """Draws a minute of the years 1950 to 2049."""
    return datetime.datetime(1950, 1, 1) + datetime.timedelta(minutes=rng.randrange(100 * 365 * 24 * 60))


def _amount(rng: random.Random, digits: int) -> decimal.Decimal:
    """Draws a number of 1 to `digits` digits before the point, each length equally likely, and 0 to 2 after it."""
    places = rng.choice((0, 0, 1, 2))
    return decimal.Decimal(rng.randrange(10 ** (rng.randint(1, digits) + places))).scaleb(-places)


def _date(rng: random.Random) -> Draw:
    day = _moment(rng).date()
    style = rng.choice(("full", "full", "long", "long", "medium", "yMMMEd", "yMd", "MMMMd", "MMMEd", "yMMMM", "yQQQQ"))
    if style in ("full", "long", "medium"):
        return lambda locale: dates.format_date(day, style, locale=locale)
    return lambda locale: dates.format_skeleton(style, day, locale=locale)


def _time(rng: random.Random) -> Draw:
    moment = _moment(rng) + datetime.timedelta(seconds=rng.randrange(60))
    style = rng.choice(("short", "medium", "with date"))
    if style == "with date":
        return lambda locale: dates.format_datetime(moment, "medium", locale=locale)
    return lambda locale: dates.format_time(moment, style, locale=locale)


def _interval(rng: random.Random) -> Draw:
    start, skeleton = _moment(rng).date(), rng.choice(("yMMMd", "yMMMd", "MMMd"))
    end = start + datetime.timedelta(days=rng.randint(1, 60))
    return lambda locale: dates.format_interval(start, end, skeleton, locale=locale)


_UNITS_OF_TIME: tuple[tuple[Literal["second", "minute", "hour", "day", "week", "year"], int], ...] = (
    *(("second", 0), ("minute", 0), ("hour", 0)),  # days of a unit, 0 for parts of one
    *(("day", 1), ("week", 7), ("year", 365)),
)


def _from_now(rng: random.Random) -> Draw:
    unit, days = rng.choice(_UNITS_OF_TIME)
    count = rng.choice((-1, 1)) * rng.randint(1, 400)
    delta = datetime.timedelta(days=count * days) if days else datetime.timedelta(**{unit + "s": count})
    # A threshold out of reach: "90 minutes" is not rounded to "2 hours".
    return lambda locale: dates.format_timedelta(delta, unit, threshold=1e9, add_direction=True, locale=locale)


def _number(rng: random.Random) -> Draw:
    value, style = _amount(rng, 7) * rng.choice((1, 1, 1, -1)), rng.choice(("plain", "plain", "percent", "compact"))
    if style == "percent":
        share = decimal.Decimal(rng.randrange(20_000)).scaleb(-4)
        return lambda locale: numbers.format_percent(share, locale=locale, decimal_quantization=False)
    if style == "compact":
        big = rng.randrange(10 ** rng.randint(4, 11))
        form: Literal["short", "long"] = rng.choice(("short", "long"))
        return lambda locale: numbers.format_compact_decimal(big, format_type=form, locale=locale, fraction_digits=1)
    return lambda locale: numbers.format_decimal(value, locale=locale)


def _currency(rng: random.Random) -> Draw:
    value, code = _amount(rng, 6), rng.choice(_CURRENCIES)
    style: Literal["standard", "name", "compact"] = rng.choice(("standard", "standard", "name", "compact"))
    if style == "compact":
        big = rng.randrange(10 ** rng.randint(4, 11))
        return lambda locale: numbers.format_compact_currency(big, code, locale=locale, fraction_digits=1)
    return lambda locale: numbers.format_currency(value, code, locale=locale, format_type=style)


def _unit(rng: random.Random) -> Draw:
    value, unit = _amount(rng, 4), rng.choice(_UNITS)
    length: Literal["long", "short"] = rng.choice(("long", "long", "short"))
    return lambda locale: units.format_unit(value, unit, length, locale=locale)


@functools.cache
def _codes(what: str) -> tuple[str, ...]:
    """Returns the two-letter codes of 'territories' or 'languages' with names in both locales, sorted."""
    english, french = (getattr(Locale(name), what) for name in ("en", "fr"))
    return tuple(sorted(c for c in english if len(c) == 2 and c in french and c not in _NO_TERRITORIES))


def _name(rng: random.Random) -> Draw:
    what = rng.choice(("territories", "languages"))
    codes = rng.sample(_codes(what), rng.randint(1, 3))
    if len(codes) == 1 and what == "languages" and rng.random() < 0.8:
        where = rng.choice(_codes("territories"))
        return lambda locale: f"{locale.languages[codes[0]]} ({locale.territories[where]})"
    style: Literal["standard", "or"] = rng.choice(("standard", "or"))
    return lambda locale: lists.format_list([getattr(locale, what)[c] for c in codes], style, locale=locale)


_KINDS: dict[str, tuple[int, Callable[[random.Random], Draw]]] = {
    "date": (9_000, _date),
    "time": (5_000, _time),
    "interval": (3_000, _interval),
    "from now": (3_000, _from_now),
    "number": (7_000, _number),
    "currency": (7_000, _currency),
    "unit": (8_000, _unit),
    "name": (6_000, _name),
}

"""Assigns a checkpoint's arrays to a state's arrays, by name.

Names are "/"-joined paths such as `params/decoder/blocks/attention/query` or `opt_state/1/count`.
"""

import collections
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_t5x.errors import UserError, did_you_mean
from diffusion_t5x.partitioning import leaf_name

# (regular expression of targets, template of the source or None); see `assign`.
Rule = tuple[str, str | None]

_MAX_ROWS = 50
_KINDS = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Returns the leaves of a tree by name, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf)
    return {leaf_name(path): leaf for path, leaf in leaves}


def assign(targets: Mapping[str, Any], sources: Mapping[str, Any], rules: Sequence[Rule]) -> dict[str, str | None]:
    """Returns the source of each target by name; None for a target that keeps its fresh initial value.

    The first rule whose regular expression matches the whole name of a target decides: its template, in which `\\1`
    stands for the first group, names the source; None keeps the fresh value. Other targets take the source of their
    own name. A source is left over when nothing reads it and no target has its name; within the parts that the state
    has too (`params`, `opt_state`, ...) that is an error, unless a rule with None matches it: then it is dropped.

    Args:
      targets: shape and dtype of each array of the state.
      sources: shape and dtype of each array of the checkpoint.
      rules: rename, keep fresh, or drop.

    Raises:
      UserError: a rule that matches nothing or is not a regular expression; or one table of all mismatches: no such
        source, another shape, another kind of dtype (all floating-point types are one kind), left over.
    """
    compiled = [(compile_pattern(pattern), source) for pattern, source in rules]
    unused = set(range(len(rules)))

    def first_match(name, candidates):
        for i, (pattern, template) in candidates:
            if match := pattern.fullmatch(name):
                unused.discard(i)
                return match, template
        return None, name

    assignment = {}
    for target in targets:
        match, template = first_match(target, enumerate(compiled))
        assignment[target] = match.expand(template) if match and template is not None else template
    parts = {name.split("/")[0] for name in targets}
    drops = [(i, rule) for i, rule in enumerate(compiled) if rule[1] is None]
    left_over = [
        name
        for name in sources.keys() - targets.keys() - set(assignment.values())
        if first_match(name, drops)[0] is None and name.split("/")[0] in parts
    ]
    if unused:
        raise UserError(_unused_message([rules[i][0] for i in sorted(unused)], targets))
    rows = [(t, _describe(targets[t]), _found(sources, t, s)) for t, s in assignment.items() if s is not None]
    rows = [row for row in rows if not _fits(targets[row[0]], sources.get(assignment[row[0]]))]
    rows += [(name, "-", _describe(sources[name])) for name in sorted(left_over)]
    if rows:
        raise UserError(_mismatch_message(rows))
    return assignment


def describe_assignment(targets: Mapping[str, Any], sources: Mapping[str, Any], rules: Sequence[Rule]) -> str:
    """Returns a description of what `assign` does: a line for each rule, and one for all arrays that no rule matches.

    Raises:
      UserError: see `assign`.
    """
    assignment = assign(targets, sources, rules)
    compiled = [re.compile(pattern) for pattern, _ in rules]
    by_rule: dict[int | None, list[str]] = {}
    for name in targets:
        by_rule.setdefault(next((i for i, rule in enumerate(compiled) if rule.fullmatch(name)), None), []).append(name)
    lines = []
    for i, (pattern, template) in enumerate(rules):
        if i in by_rule:
            how = "start fresh" if template is None else f"come from {template}"
            lines.append(f"{_in_short(by_rule[i])} {how}, by the rule {(pattern, template)!r}")
    if None in by_rule:
        lines.insert(0, f"{_in_short(by_rule[None])} as in the checkpoint")
    if unread := [name for name in sources if name not in set(assignment.values())]:
        lines.append(f"{_in_short(unread)} of the checkpoint are not read")
    return "\n".join(f"  {line}" for line in lines)


def _in_short(names: Sequence[str]) -> str:
    parts = collections.Counter(name.partition("/")[0] for name in names)
    return ", ".join(part if part in names else f"{part}/ ({count} arrays)" for part, count in sorted(parts.items()))


def compile_pattern(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"The assignment rule {pattern!r} is not a regular expression: {error}.") from error


def _fits(target: Any, source: Any) -> bool:
    if source is None or tuple(target.shape) != tuple(source.shape):
        return False
    return all(jnp.issubdtype(target.dtype, kind) == jnp.issubdtype(source.dtype, kind) for kind in _KINDS)


def _describe(leaf: Any) -> str:
    return f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _found(sources: Mapping[str, Any], target: str, source: str) -> str:
    found = _describe(sources[source]) if source in sources else "-"
    return found if source == target else f"{found}  ({source})"


def _mismatch_message(rows: list[tuple[str, str, str]]) -> str:
    header = ("parameter", "in the model", "in the checkpoint")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(2)]
    shown = [header, *rows[:_MAX_ROWS]]
    lines = [f"  {name:{widths[0]}}  {model:{widths[1]}}  {found}" for name, model, found in shown]
    if len(rows) > _MAX_ROWS:
        lines.append(f"  ... and {len(rows) - _MAX_ROWS} more")
    name = re.escape(rows[0][0])
    return "\n".join(
        [
            "The checkpoint does not fit the model:",
            *lines,
            f"Assignment rules say what to do: ({name!r}, None) leaves it at its fresh initial value (or drops it, "
            f"where only the checkpoint has it), ({name!r}, 'NAME') reads it from another name in the checkpoint.",
        ]
    )


def _unused_message(patterns: list[str], targets: Mapping[str, Any]) -> str:
    return (
        f"These assignment rules match no array of the model: {', '.join(map(repr, patterns))}. "
        f"A rule matches the whole name, such as {next(iter(targets))!r}.{did_you_mean(patterns[0], targets)}"
    )

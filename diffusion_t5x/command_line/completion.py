"""Print a completion script: verbs, flags, shipped gin files and macros.

bash: diffusion-t5x completion bash > ~/.local/share/bash-completion/completions/diffusion-t5x
zsh:  diffusion-t5x completion zsh >> ~/.zshrc
"""

import argparse
from collections.abc import Iterator

from diffusion_t5x.command_line import gin_macros, help_pages
from diffusion_t5x.command_line.gin_reading import shipped
from diffusion_t5x.command_line.verbs import VERBS

_SCRIPT = """\
_diffusion_t5x() {
  local word="${COMP_LINE:0:COMP_POINT}" verb="${COMP_WORDS[1]}" words
  word="${word##* }"
  case "$word" in
    --gin_file=*) words="@GIN_FILES@"; words="${words//@/--gin_file=}" ;;
    --gin.*) words="@MACROS@"; words="${words//@/--gin.}" ;;
    *) if [ "$COMP_CWORD" = 1 ]; then words="@VERBS@"; else
      case "$verb" in
@CASES@
      esac; fi ;;
  esac
  # COMPREPLY replaces the last piece of a word that bash splits at "=" and ":".
  local cut="${word%"${COMP_WORDS[COMP_CWORD]}"}"
  [[ "${COMP_WORDS[COMP_CWORD]}" == "=" ]] && cut="$word"
  local found reply=()
  for found in $(compgen -W "$words" -- "$word"); do reply+=("${found#"$cut"}"); done
  COMPREPLY=("${reply[@]}")
  [[ "${COMPREPLY[0]}" == *= ]] && compopt -o nospace
  [ "${#COMPREPLY[@]}" -gt 0 ] || compopt -o default
}
complete -F _diffusion_t5x diffusion-t5x
"""


def script(shell: str) -> str:
    """Returns the completion script for "bash" or "zsh"."""
    flags: dict[str, list[str]] = {}
    for name in VERBS:
        first, _, second = name.partition(" ")
        words = [second] * bool(second) + list(_words(help_pages.parser(name)))
        flags.setdefault(first, []).extend(word for word in words if word not in flags.get(first, ()))
    cases = "\n".join(f'        {verb}) words="{" ".join(words)}" ;;' for verb, words in flags.items())
    text = _SCRIPT.replace("@VERBS@", " ".join(flags)).replace("@CASES@", cases)
    text = text.replace("@GIN_FILES@", " ".join(f"@{file}" for file in shipped()))
    text = text.replace("@MACROS@", " ".join(f"@{name}=" for name in gin_macros.macros()))
    return f"autoload -U +X bashcompinit && bashcompinit\n{text}" if shell == "zsh" else text


def _words(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yields the flags of a parser, with "=" if they take a value, and the words that it can choose from."""
    for action in parser._actions:
        if action.option_strings:
            yield action.option_strings[-1] + ("" if action.nargs == 0 else "=")
        else:
            yield from action.choices or ()


def main() -> None:
    """Prints the script for the given shell."""
    print(script(help_pages.arguments("completion").shell), end="")


if __name__ == "__main__":
    main()

"""A conversation of several turns in a terminal, with commands that change it."""

import dataclasses

from diffusion_t5x.chat.conversation import Terminal, ask, say
from diffusion_t5x.data.chat_template import Message
from diffusion_t5x.errors import UserError, did_you_mean

_HELP = """\
/help           show this list
/edit [TEXT]    change your last message and answer it again; without a text, edit it in the line
/retry          answer your last message again
/undo           take back your last message and its answer
/reset          begin a new conversation
/system [TEXT]  set the system prompt, or show it; it holds from the next answer on
//TEXT          send a message that begins with a slash
An empty line or Ctrl-D ends the program, Ctrl-C stops an answer."""

_COMMANDS = ("/help", "/edit", "/retry", "/undo", "/reset", "/system")


@dataclasses.dataclass
class History:
    """A conversation so far.

    Attributes:
      system: the system prompt; None for none.
      turns: the user's messages, each with its answer.
    """

    system: str | None = None
    turns: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def asking(self, text: str) -> list[Message]:
        """Returns the messages of the conversation, and a new one of the user at its end."""
        said = [] if self.system is None else [("system", self.system)]
        for question, answer in self.turns:
            said += [("user", question), ("assistant", answer)]
        return [{"role": role, "content": content} for role, content in [*said, ("user", text)]]


@dataclasses.dataclass(frozen=True)
class Talk(Terminal):
    """A conversation in a terminal: the model sees all earlier turns. It goes on from the first of several samples."""

    def run(self, prompt: str | None) -> None:
        """Answers the prompt; without one, holds a conversation with the user."""
        if prompt is not None:
            super().run(prompt)
            return
        say("A conversation: the model sees every turn. /help lists the commands.")
        history = History(self.prompts.system)
        for number, line in enumerate(iter(ask, None)):
            try:
                self._hear(line, history, number)
            except UserError as error:
                say(str(error))

    def _hear(self, line: str, history: History, number: int) -> None:
        """Does what a line asks for. If nothing is answered, the conversation stays as it was."""
        if not line.startswith("/"):
            self._reply(history, history.turns, line, number)
            return
        if line.startswith("//"):
            self._reply(history, history.turns, line[1:], number)
            return
        command, _, text = line.partition(" ")
        if command not in _COMMANDS:
            raise UserError(f"There is no command {command}.{did_you_mean(command, _COMMANDS)} /help lists them.")
        if command == "/help":
            say(_HELP)
        elif command == "/system":
            if text:
                history.system = text
            say(f"The system prompt: {history.system}" if history.system else "There is no system prompt.")
        elif command == "/reset":
            history.turns.clear()
            say("A new conversation.")
        elif not history.turns:
            raise UserError(f"{command} needs a message that was answered.")
        elif command == "/undo":
            question, _ = history.turns.pop()
            say(f"Taken back: {question}")
        else:
            question = history.turns[-1][0]
            if command == "/edit":
                question = text or ask(prefilled=question) or ""
            if question:
                self._reply(history, history.turns[:-1], question, number)

    def _reply(self, history: History, turns: list[tuple[str, str]], question: str, number: int) -> None:
        """Answers a question after these turns; then they are the conversation."""
        messages = History(history.system, turns).asking(question)
        answer = self._answer(self.prompts.answering(messages, number))
        if answer is not None:
            history.turns = [*turns, (question, answer)]

"""Foreign texts on a terminal and in pipes: nothing is obeyed, nothing fails, nothing is lost."""

import datetime
import io
import os
import pty
import subprocess
import sys
import types

import pytest
import rich.table
import rich.text
from variants import quick

from diffusion_t5x import checkpoints as checkpoints_verb
from diffusion_t5x import terminal
from diffusion_t5x.chat.conversation import Plain
from diffusion_t5x.command_line import config
from diffusion_t5x.console import Console
from diffusion_t5x.errors import UserError
from diffusion_t5x.progress import Progress
from diffusion_t5x.reporting import report, runs

HOSTILE = {
    "clears the screen": "\x1b[2J",
    "title": "\x1b]0;title\x07",
    "title, ended by ST": "\x1b]0;title\x1b\\",
    "C1": "\x9b2J\x9d0;x\x9c",
    "status report": "\x1b[6n",
    "carriage return": "harmless\rharmful",
    "backspace": "rm\b\bls",
    "bidi override": "\u202eabc\u2066def\u2069",
    "line separators": "a\u2028b\u2029c\x85d\x0be\x0cf",
    "delete": "\x7f",
    "bytes": os.fsdecode(b"\xff\x9b"),
    "a lone surrogate": "\ud800",
    "invisible": "a\u200bb\ufeffc\U000e0041",
}
ALLOWED = set("\n\t")


def obeyed(text):
    """Characters of the text that a terminal might obey."""
    return {x for x in text if not x.isprintable()} - ALLOWED


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_safe(text):
    shown = terminal.safe(f"before{text}after")
    assert not obeyed(shown) and shown.startswith("before") and shown.endswith("after")
    assert text not in shown


TEXTS = ["", "two\nlines\n", "a\tb", "été ☃ 漢字", "a\u00a0b\u3000c", "[b]x", "\u0645\u06cc\u200c\u062e", "👩\u200d🚀"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_stays_text(text):
    assert terminal.safe(text) == text


def test_signs():
    assert terminal.safe("\x1b[1m\r\x7f\x9b\u202e" + os.fsdecode(b"\xff")) == "␛[1m␍␡<U+009B><U+202E><0xFF>"


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_tables_hold_what_is_safe(text):
    file = io.StringIO()
    console = Console(file=file, markup=False, highlight=False, width=10_000)
    table = rich.table.Table(title=text)
    table.add_column(text)
    table.add_row(f"cell {text} end")
    console.print(f"line {text} end", table)
    shown = file.getvalue()
    assert not obeyed(shown)
    assert f"line {terminal.safe(text)} end" in shown and f"cell {terminal.safe(text)} end" in shown


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_errors_and_log_lines(text, capsys, monkeypatch):
    # pytest's own handler would put the text into its report, which cannot hold what is not UTF-8.
    monkeypatch.setattr(config.logging.getLogger("diffusion_t5x"), "handlers", [])
    with pytest.raises(SystemExit) as ended, config.program():
        config.logging.getLogger("diffusion_t5x").info("log %s", text)
        raise UserError(f"a file {text}")
    shown = capsys.readouterr().err
    assert ended.value.code == 2 and not obeyed(shown)
    assert f"error: a file {terminal.safe(text)}\n" in shown and f"log {terminal.safe(text)}\n" in shown


def test_a_missing_folder_with_an_odd_name(tmp_path, capsys):
    for main in (lambda path: checkpoints_verb.main(["list", path]), lambda path: report_main([path])):
        with pytest.raises(SystemExit) as ended:
            main(f"{tmp_path}/\x1b[2J\x9b")
        shown = capsys.readouterr().err
        assert ended.value.code == 2 and "␛[2J<U+009B>" in shown and not obeyed(shown)


def report_main(argv):
    from diffusion_t5x import report as verb

    verb.main(argv)


def test_a_report_s_markdown():
    scores = runs.Scores("\x1b[2Jtask", "model\u202e", 1, "decoder\x07", 3, {"\x9bf1": 1.0})
    run = runs.Run("\x1b]0;x\x07run", "", datetime.datetime.now(datetime.UTC), (), (scores,), (), ())
    page = report.render([run], "md")
    assert "<U+009B>" in page and not obeyed(page)


def test_progress(monkeypatch):
    for is_terminal in (False, True):
        file = io.StringIO()
        file.isatty = lambda is_terminal=is_terminal: is_terminal
        monkeypatch.setattr(sys, "stderr", file)
        with Progress(2, description="eval \x9b[task]\r") as progress:
            progress.update(2, {"\x1b[2Jloss\r": 1.0})
        assert "eval <U+009B>[task]␍" in file.getvalue()
        assert "␛[2Jloss␍ 1.0000" in file.getvalue()


PROGRAM = """
import sys, types
from diffusion_t5x.command_line import config
from diffusion_t5x.chat.conversation import Plain

{before}
prompts = types.SimpleNamespace(batch=lambda text, number: text, to_text=lambda tokens: tokens)
write = lambda text, sample: types.SimpleNamespace(tokens=ANSWER or text, figures=lambda: "")
ANSWER = {answer!a}
with config.program():
    Plain(prompts, types.SimpleNamespace(write=write), 1).run({prompt!a})
"""


def start(answer="", prompt=None, before="", flags=(), **options):
    """A process that answers each line as `generate` does, with the line itself or with `answer`."""
    program = PROGRAM.format(answer=answer, prompt=prompt, before=before)
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *flags, "-c", program], **streams | options)


LOCALES = {
    "ASCII": {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    "Latin-1": {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"},
    "C": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    "none": {},
}


@pytest.mark.parametrize("locale", quick(LOCALES, ["C"]))
def test_a_pipe_is_utf8_in_every_locale(locale):
    """And an answer a line, whatever is in the lines."""
    lines = ["a\rb", "déjà ☃", "", "d\u2028e", "f\x85g", "\x1b[2J\x9b", "back\\slash"]
    with start(env=os.environ | LOCALES[locale]) as process:
        out, err = process.communicate("".join(f"{line}\n" for line in lines).encode())
    assert process.returncode == 0, err
    assert out.decode().split("\n") == [line.replace("\\", "\\\\").replace("\r", "\\r") for line in lines] + [""]


def test_lines_that_end_as_in_windows_and_one_without_an_end():
    with start() as process:
        assert process.communicate(b"a\r\n\r\nb")[0] == b"a\n\nb\n"


def test_what_is_no_utf8():
    with start(answer="\ud800\udcff") as process:
        out, _ = process.communicate(b"a\n")
    assert out == b"\\ud800\\udcff\n"
    with start(env=os.environ | LOCALES["C"]) as process:
        _, err = process.communicate(b"\xff\n")
    assert process.returncode == 2 and b"error: Standard input is not UTF-8" in err and b"Traceback" not in err


@pytest.mark.parametrize("text", quick(["\x1b[2J\x9b\u202e", "é"], ["\x1b[2J\x9b\u202e"]))
def test_an_answer_in_a_pipe_that_leads_to_a_terminal(text):
    ours, theirs = pty.openpty()
    with start(answer=text, stdout=theirs) as process:
        os.close(theirs)
        process.communicate(b"prompt\n")
        written = os.read(ours, 1000).decode()
    os.close(ours)
    assert written == f"{terminal.safe(text)}\r\n"


def test_a_terminal_without_the_letters():
    ours, theirs = pty.openpty()
    with start(answer="é", stdout=theirs, env=os.environ | LOCALES["ASCII"]) as process:
        os.close(theirs)
        process.communicate(b"prompt\n")
        assert process.returncode == 0 and os.read(ours, 1000) == b"\\xe9\r\n"
    os.close(ours)


FULL = "/dev/full"


@pytest.mark.parametrize(
    ("prompt", "flags"),
    quick([("one", ()), ("one", ("-u",)), (None, ()), (None, ("-u",))], [("one", ()), (None, ("-u",))]),
)
@pytest.mark.skipif(not os.path.exists(FULL), reason=f"no {FULL}")
def test_a_full_disk_is_one_line(prompt, flags):
    with open(FULL, "wb") as full, start("x" * 100_000, prompt, flags=flags, stdout=full) as process:
        _, err = process.communicate(b"a\n" * 3)
    assert process.returncode == 1
    assert err.decode().strip() == "error: standard output cannot be written: No space left on device."


@pytest.mark.skipif(not os.path.exists(FULL), reason=f"no {FULL}")
def test_messages_that_cannot_be_written_stop_nothing():
    with open(FULL, "wb") as full, start(stderr=full) as process:
        assert process.communicate(b"a\nb\n")[0] == b"a\nb\n"
    assert process.returncode == 0


PRINTING = """
from diffusion_t5x.command_line import config
with config.program():
    for number in range(100_000): print(number)
"""


@pytest.mark.parametrize("flags", [(), ("-u",)], ids=["buffered", "unbuffered"])
def test_a_reader_that_goes_away(flags):
    command = [sys.executable, *flags, "-c", PRINTING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize("closed", quick(["0", "1", "2", "012"], ["012"]))
def test_closed_streams(closed, tmp_path):
    """A shell's `>&-`."""
    program = PRINTING.replace("100_000", "3") + f"\n    open({str(tmp_path / 'done')!r}, 'w').close()"
    redirections = " ".join(f"{number}{'<' if number == '0' else '>'}&-" for number in closed)
    command = ["sh", "-c", f'exec "$@" {redirections}', "sh", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, check=True)
    assert (tmp_path / "done").exists() and done.stderr == b""
    assert done.stdout == (b"" if "1" in closed else b"0\n1\n2\n")


def test_the_process_has_its_streams_back():
    before = sys.stdin, sys.stdout, sys.stderr
    with config.program():
        pass
    assert (sys.stdin, sys.stdout, sys.stderr) == before


def test_unexpected_errors(capsys):
    with config.program():
        pass
    error = ValueError("\x1b[2J")
    config._print_exception(ValueError, error, None)
    assert capsys.readouterr().err == "ValueError: ␛[2J\n"


def test_an_answer_is_whole_where_it_is_no_terminal(capsys):
    prompts = types.SimpleNamespace(batch=lambda text, number: None, to_text=lambda tokens: "\x1b[2J\n\x9b")
    answers = types.SimpleNamespace(write=lambda batch, sample: types.SimpleNamespace(tokens=[], figures=lambda: ""))
    Plain(prompts, answers, 1).run("x")
    assert capsys.readouterr().out == "\x1b[2J\n\x9b\n"


@pytest.mark.parametrize("words", quick(["", "--version", "train --help", "completion bash", "env"], ["train --help"]))
def test_pages_and_lists_on_a_full_disk_are_one_line(words):
    with open(FULL, "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "diffusion_t5x", *words.split()], stdout=full, stderr=subprocess.PIPE, timeout=300
        )
    assert done.returncode == 1
    assert done.stderr == b"error: standard output cannot be written: No space left on device.\n"


def test_help_goes_through_any_encoding():
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    words = [sys.executable, "-m", "diffusion_t5x.train", "--help"]
    done = subprocess.run(words, capture_output=True, env=environment, timeout=300, check=True)
    assert "\u2026" in done.stdout.decode("utf-8")

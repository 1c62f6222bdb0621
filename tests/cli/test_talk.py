"""What a person sees: on wide and narrow terminals, quiet, mistyped, and after TAB."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from disk_models import run

from onnx_adapt.cli import _COMMANDS, cli

ROOT = Path(__file__).parent.parent.parent
PROGRAM = Path(sys.executable).parent / "onnx-adapt"
NODE = "mos_estimator_small_1/dense_4/MatMul_add"
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder the commands run in, with a model in it."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "models/dnsmos-p808.onnx", "base.onnx")
    return tmp_path


def terminal(*arguments: str, columns: int = 80, term: str = "xterm") -> str:
    """What a terminal of this width is sent."""
    import pty

    main, side = pty.openpty()
    env = {**os.environ, "TERM": term, "COLUMNS": str(columns)}
    with subprocess.Popen(
        [PROGRAM, *arguments], stdin=side, stdout=side, stderr=side, env=env
    ):
        os.close(side)
        seen = b""
        with contextlib.suppress(OSError):  # Linux says EIO when the other side is closed
            while piece := os.read(main, 65536):
                seen += piece
    os.close(main)
    return seen.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_name_is_never_broken_on_a_terminal(columns: int) -> None:
    seen = ESCAPE.sub("", terminal("sites", "base.onnx", columns=columns))
    assert seen.count(NODE) == 1
    assert seen.count("main:mos_estimator_small_1/dense_4/BiasAdd:0") == 1
    tabular = [line for line in seen.splitlines() if line.startswith("address")]
    assert len(tabular) == (columns == 200)


def test_a_narrow_terminal_wraps_prose_between_words() -> None:
    terminal("insert", "base.onnx", "--after", NODE, "--no-verify", "-o", "a.onnx")
    seen = ESCAPE.sub("", terminal("verify", "base.onnx", "a.onnx", columns=60))
    table = seen[seen.index("check ") : seen.index("\n\n")].splitlines()
    assert max(len(line.rstrip()) for line in table) <= 60
    assert "interface  ok" in seen
    assert f"{NODE}\n  error " in seen


def test_a_dumb_terminal_gets_no_escape_codes() -> None:
    seen = terminal("insert", "base.onnx", "--after", NODE, term="dumb")
    assert NODE in seen
    assert "\x1b" not in seen


def test_work_of_over_a_second_shows_what_is_going_on() -> None:
    code = (
        "import time\n"
        "from onnx_adapt.cli.progress import patience\n"
        "with patience('reading [m].onnx') as (progress, _):\n"
        "    time.sleep(1.5)\n"
        "    progress(2_500_000, 10_000_000)\n"
        "    time.sleep(0.3)\n"
    )
    import pty

    main, side = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-c", code], stderr=side, stdout=subprocess.PIPE, env=env, check=True
    )
    os.close(side)
    seen = b""
    with contextlib.suppress(OSError):
        while piece := os.read(main, 65536):
            seen += piece
    os.close(main)
    assert b"reading [m].onnx" in seen
    assert b"2.5/10.0 MB" in seen
    assert re.search(rb"0:0\d:\d[1-9]", seen)
    assert done.stdout == b""


@pytest.mark.parametrize("place", ["before", "after"])
def test_quiet_says_nothing_but_errors(place: str) -> None:
    arguments = ["insert", "base.onnx", "--after", NODE, "-o", "a.onnx", "--json"]
    done = run(*(["-q", *arguments] if place == "before" else [*arguments, "--quiet"]))
    assert done.status == 0
    assert done.err == ""
    assert run(*arguments).out.split('"adapter"')[1] == done.out.split('"adapter"')[1]
    failed = run("--quiet", "slots", "no.onnx")
    assert [line.split()[0] for line in failed.err.splitlines()] == ["error:", "hint:"]
    assert "next: " in run("slots", "a.onnx").err, "quiet once is not quiet for ever"


CASE = ROOT / "tests/cases/peft_bert_lora_default_ts"
FILE = "bert.adapted.fr.safetensors"
WALK = (
    ["sites", "base.onnx"],
    ["insert", "base.onnx", "--after", NODE, "--no-verify", "--thin", "-o", "t.onnx"],
    ["pack", "t.onnx"],
    ["slots", "base.onnx"],
    ["insert", "bert.onnx", "--adapter", f"{CASE}/adapter", "--name", "fr"],
    ["verify", "bert.onnx", "bert.adapted.onnx"],
    ["slots", "bert.adapted.onnx"],
    ["convert", f"{CASE}/adapter", "--for", "bert.adapted.onnx", "-o", "de.npz"],
    ["check", "bert.adapted.onnx", FILE],
    ["run", "bert.adapted.onnx", "--inputs", "x.npz", "--adapter", FILE],
    ["fill", "bert.adapted.onnx", FILE],
    ["extract", "bert.adapted.filled.onnx", "-o", "e.safetensors"],
    ["check", "bert.adapted.filled.onnx", "e.safetensors"],
    ["remove", "bert.adapted.onnx"],
    ["insert", "base.onnx", "--after", NODE, "--batched", "-o", "rows.onnx"],
    ["pack-rows", "rows.onnx", "-", "-", "-o", "rows.npz"],
    ["check", "rows.onnx", "rows.npz"],
    ["build", "8"],
)


def test_every_command_ends_with_the_next_one_which_works() -> None:
    shutil.copy(CASE / "base.onnx", "bert.onnx")
    shutil.copy(CASE / "inputs.npz", "x.npz")
    for arguments in WALK:
        done = run(*arguments)
        assert done.status == 0, done
        words = shlex.split(done.err.splitlines()[-1])
        assert words[:2] == ["next:", "onnx-adapt"], done.err
        if "trained/" not in words:  # a placeholder
            assert run(*words[2:]).status == 0, words


@pytest.mark.parametrize("name", _COMMANDS)
def test_the_help_of_every_command_has_an_example(name: str) -> None:
    done = run(name, "--help")
    assert done.status == 0
    assert re.search(rf"^ +(eval \"\$\()?onnx-adapt {name} ", done.out, re.MULTILINE)
    assert "--quiet" in done.out


def test_the_list_of_commands_cuts_no_sentence_short() -> None:
    done = run("--help")
    commands = done.out[done.out.index("Commands:") :]
    assert commands.count("\n") >= len(_COMMANDS)
    assert "..." not in commands


@pytest.mark.parametrize(("typed", "meant"), [("isert", "insert"), ("verfy", "verify")])
def test_a_mistyped_command_is_told_what_was_meant(typed: str, meant: str) -> None:
    done = run(typed, "base.onnx")
    assert f"Did you mean '{meant}'?" in done.error
    assert done.hint == "hint: see `onnx-adapt --help`"


def test_a_mistyped_option_is_told_what_was_meant() -> None:
    assert "--after" in run("insert", "base.onnx", "--aftr", "x").error


def completions(*words: str, incomplete: str = "") -> list[str]:
    """What is offered for the next word."""
    from click.shell_completion import ShellComplete

    found = ShellComplete(cli, {}, "onnx-adapt", "_X").get_completions(list(words), incomplete)
    return [item.value if item.type == "plain" else item.type for item in found]


def test_completion_offers_commands_files_nodes_slots_adapters_and_activations() -> None:
    assert completions(incomplete="re") == ["remove", "report"]
    assert completions("insert") == ["file"]
    assert completions("insert", "base.onnx", "--after", incomplete="mos") == [
        f"mos_estimator_small_1/dense_{n}/MatMul_add" for n in (3, 4, 5)
    ]
    assert "gelu" in completions("insert", "base.onnx", "--activation")
    run("insert", "base.onnx", "--after", NODE, "-o", "a.onnx")
    assert completions("remove", "a.onnx", "--slot") == [NODE]
    Path("a.fr.onnx_adapter").touch()
    assert completions("run", "a.onnx", "--adapter", incomplete="f") == ["fr"]
    assert completions("run", "a.onnx", "--adapter", incomplete="./") == ["file"]


def test_completion_after_a_model_that_cannot_be_read_offers_nothing() -> None:
    Path("bad.onnx").write_bytes(b"no model")
    assert completions("insert", "bad.onnx", "--after", incomplete="m") == []
    assert completions("insert", "--after", incomplete="m") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_asks_the_program(shell: str) -> None:
    done = run("completion", shell)
    assert done.status == 0
    assert f"_ONNX_ADAPT_COMPLETE={shell}_complete" in done.out
    assert "completion" in done.err


def test_bash_completes_a_node_name() -> None:
    script = (
        f'eval "$({PROGRAM} completion bash 2>/dev/null)"\n'
        "COMP_WORDS=(onnx-adapt insert base.onnx --after mos_estimator_small_1/dense_4)\n"
        "COMP_CWORD=4\n"
        "_onnx_adapt_completion onnx-adapt\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    env = {**os.environ, "PATH": f"{PROGRAM.parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == NODE, done

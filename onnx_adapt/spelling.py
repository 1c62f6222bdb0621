"""What the commands and options of the shell are called in Python.

Hints are written once, in the words of the command line, which prints them as they are.
`str(error)` says the same in Python's words, by the table below.
"""

from __future__ import annotations

import re

_PHRASES = (
    (
        r"`onnx-adapt convert ([^\s`]+) --for \S+ -o [^\s`]+`",
        r'`oa.save_adapter(oa.convert("\1", model), "NAME.safetensors")`',
    ),
    (
        r"`onnx-adapt insert FOLDER --adapter DIR -o OUT`",
        r'`oa.insert_folder("FOLDER", "DIR")`',
    ),
    (
        r"`onnx-adapt insert BASE --adapter DIR --calibrate INPUTS.npz`",
        r'`oa.calibrate(model, adapter, "INPUTS.npz")`',
    ),
    (
        r"`onnx-adapt insert \S+ --adapter ([^\s`]+)`",
        r'`oa.load_checkpoint("\1", model)`, then `oa.insert_checkpoint`',
    ),
    (
        r"`onnx-adapt run \S+ --inputs x.npz --adapter ([^\s`]+)`",
        r'`oa.AdapterSession("MODEL.onnx", {"name": "\1"})`',
    ),
    (
        r"`onnx-adapt insert --no-verify` does without",
        r"saving without `oa.verify` does without",
    ),
    (r"skip the proof with --no-verify", r"save the model without `oa.verify`"),
    (r"`onnx-adapt fill MODEL FILE`", r'`oa.fill(model, "FILE")`'),
    (r"`onnx-adapt verify --adapter`", r"`oa.verify(base, model, adapter=adapter)`"),
    (r"`onnx-adapt verify --json`", r"`Report.as_dict`"),
    (r"`onnx-adapt --help`", r"`help(onnx_adapt)`"),
    (r"`merge --for MODEL`", r"`base=`"),
    (r"\binsert --adapter makes", r"`oa.insert_checkpoint` makes"),
    (
        r"their weights files and --for MODEL",
        r"their weights files as tuned= and base_weights=",
    ),
    (r"take the data with --json", r"take the data of `Overview.as_dict`"),
    (r"\(-o ([^)]+)\)", r"(\1)"),
    (r"`convert` and `extract` write", r"`oa.convert` and `oa.extract` make"),
)
"""Phrases of more than one option or name: as the command line says them, and in Python."""

_FUNCTIONS = {
    "convert": "convert",
    "extract": "extract",
    "fill": "fill",
    "insert": "insert",
    "inspect": "inspect",
    "remove": "remove",
    "sites": "find_sites",
    "slots": "list_slots",
    "verify": "verify",
}
"""Commands that are functions; a hint names any other as a command of the shell."""

_OPTIONS = {
    "--adapter": 'adapter="{}"',
    "--after": 'after="{}"',
    "--allow-missing": 'allow_missing=["{}"]',
    "--allow-partial": "allow_partial=True",
    "--axis": "axis={}",
    "--baked": "baked=True",
    "--base-weights": 'base_weights="{}"',
    "--batch-axis": "batch_axis={}",
    "--batched": "batched=True",
    "--bottleneck": "bottleneck={}",
    "--checkpoint": 'checkpoint="{}"',
    "--force": "overwrite=True",
    "--forward-only": "settings=Settings(forward_only=True)",
    "--inline-functions": "inline_functions=True",
    "--inputs": 'inputs="{}"',
    "--labels": 'labels="{}"',
    "--log": 'path="{}"',
    "--map": 'module_map={{"{}": "{}"}}',
    "--no-check": "check=False",
    "--recompute": "recompute=True",
    "--part": 'part="{}"',
    "--resume": "resume=True",
    "--text": 'columns=("{}",)',
    "--stack": "stack=True",
    "--thin": "thin=True",
    "--tokenizer": 'text=Texts("{}")',
    "--to": 'library="{}"',
    "-o": 'path="{}"',
}
"""Options and the arguments that they are in Python, with their values."""

FOREIGN = ("--extra_options", "--saved-model", "--tflite", "--keras", "--output", "--task")
"""Options of other programs, which hints name as they are."""

_NO_VALUE = (
    *("and", "each", "finds", "for", "gives", "if", "inserts", "leaves", "names", "of", "or"),
    *("says", "take", "takes", "tells", "to", "where", "which", "writes"),
)
"""Words that follow an option in a sentence, where no value of it does."""


def in_python(text: str) -> str:
    """A text in the words of the command line, in those of Python.

    Example:
        >>> in_python("give --map a.b=c or --allow-partial; see `onnx-adapt slots`")
        'give module_map={"a.b": "c"} or allow_partial=True; see `oa.list_slots`'
    """
    for pattern, words in _PHRASES:
        text = re.sub(pattern, words, text)
    text = re.sub(r"`onnx-adapt ([a-z-]+)([^`]*)`", _function, text)
    return _OPTION.sub(_argument, text)


def _function(found: re.Match[str]) -> str:
    """A command in backticks, as a function or as a command of the shell."""
    name = _FUNCTIONS.get(found[1])
    return f"`oa.{name}`" if name else f"the command {found[0]}"


_OPTION = re.compile(
    rf"(?<![\w-])({'|'.join(_OPTIONS)})(?![\w-])"
    rf"(?: (?!(?:{'|'.join(_NO_VALUE)})\b)(?:'([^']*)'|([^\s;,:`)]+)))?"
)


def _argument(found: re.Match[str]) -> str:
    """An option, with its value if it has one, as an argument."""
    form = _OPTIONS[found[1]]
    value = found[2] if found[2] is not None else found[3]
    if "{}" not in form:  # a flag; what follows is the sentence
        return form + found[0].removeprefix(found[1])
    if value is None:
        return form.partition("=")[0] + "="
    old, _, new = value.partition("=")
    return form.format(old, new) if "{{" in form else form.format(value)

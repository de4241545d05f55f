"""Tasks that a language model does by its prompt alone, each a small TOML file: p(output | input,
task) with the task written as text. Those in tasks/ come with the package; one of a user's own is
named by its path.

    kind = "choice"          which answer is the likeliest behind the prompt?
           "cloze"           which word, in the text's blank, makes the likeliest rest of the text?
           "last-word"       is the text's last word the likeliest one? (LAMBADA)
           "generation"      what does the model write behind the prompt?
    format = "jsonl"         tsv, csv, lines, mctest, cbt (gpt/rows.py)
    folder = "snli"          where the files are, below the folder of all data
    prompt = "{premise}\\nQuestion: {hypothesis} True or False?\\nAnswer:"
    answer = " {answer}"     what follows the prompt, {answer} being a label, choice or reference;
                             behind the end of a line, without its space
    label = "label"          column of the right answer; of a choice, its number from 0
    choices = ["a", "b"]     columns, or one that holds a list
    references = ["target"]  "generation": columns of right answers, or one that holds a list
    metrics = ["f1"]         "generation": exact, f1, bleu (metrics.py)
    max_new_tokens = 32      "generation": the longest answer, in tokens
    stop = ["\\n"]            "generation": an answer ends before it
    blank = "XXXXX"          "cloze": what stands in the blank
    normalise = "tokens"     "choice": what candidates are compared by: their log-probability over
                             the number of "tokens"; "none", as it is; or "unconditional", less
                             that behind the text `unconditional` alone
    unconditional = "Answer:"
    description = ""         put before everything
    separator = "\\n\\n"       between examples
    group = "subject"        column: examples in a prompt are of the asked one's group
    cut = "article"          a field of the prompt, which loses its end where the question is longer
                             than the context; without it the prompt loses its beginning
    detokenizer = "ptb"      takes word tokenisers' marks out of texts (detokenizers.py)
    [labels]                 what stands in the file = the answer in words; with choices, the number
    [files]                  test or validation, which are asked; train, examples are drawn from it

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, sections 2 and 3;
Brown et al., "Language Models are Few-Shot Learners", 2020, section 2.4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptkernels.core.names import check_name
from gptkernels.gpt import task_files
from gptkernels.gpt.evaluation.detokenizers import DETOKENIZERS
from gptkernels.gpt.evaluation.template import Template
from gptkernels.gpt.rows import FORMATS, Column
from gptkernels.gpt.task_files import a, check_keys, list_of, table

KINDS = ("choice", "cloze", "last-word", "generation")
NORMALISATIONS = ("none", "tokens", "unconditional")
METRICS = ("exact", "f1", "bleu")
SPLITS = ("train", "validation", "test")

_OWN = Path(__file__).parent / "tasks"
_ANSWER = Template(" {answer}")
_KEYS = {
    "kind": ("a string", a(str)),
    "format": ("a string", a(str)),
    "folder": ("a string", a(str)),
    "prompt": ("a string", a(str)),
    "answer": ("a string", a(str)),
    "label": ("a column, a name or a number", a(str | int)),
    "choices": ("a list of columns, names or numbers", list_of(str | int)),
    "references": ("a list of columns, names or numbers", list_of(str | int)),
    "metrics": ("a list of strings", list_of(str)),
    "max_new_tokens": ("a number of at least 1", lambda value: a(int)(value) and value > 0),
    "stop": ("a list of strings", list_of(str)),
    "blank": ("a string", a(str)),
    "normalise": ("a string", a(str)),
    "unconditional": ("a string", a(str)),
    "description": ("a string", a(str)),
    "separator": ("a string", a(str)),
    "group": ("a column, a name or a number", a(str | int)),
    "cut": ("a column, a name or a number", a(str | int)),
    "detokenizer": ("a string", a(str)),
    "labels": ("a table of strings", table),
    "files": ("a table of strings", table),
}
_NEEDED = ("kind", "format", "prompt", "files")
# The keys that belong to some kinds alone.
_OF_KINDS = {
    "answer": ("choice", "generation"),
    "cut": ("choice", "generation"),
    "label": ("choice", "cloze"),
    "choices": ("choice", "cloze"),
    "labels": ("choice",),
    "normalise": ("choice",),
    "unconditional": ("choice",),
    "references": ("generation",),
    "metrics": ("generation",),
    "max_new_tokens": ("generation",),
    "stop": ("generation",),
    "blank": ("cloze",),
}


@dataclass(frozen=True)
class Task:
    """A data set, and how a language model is asked about it. Raises ValueError for a description
    that makes no sense.

    Fields: as in the file (see the module); `name` is the file's, `home` its folder, where it is a
    user's own.
    """

    name: str
    kind: str
    format: str
    files: Mapping[str, str]
    prompt: Template
    answer: Template = _ANSWER
    label: Column | None = None
    choices: tuple[Column, ...] = ()
    references: tuple[Column, ...] = ()
    metrics: tuple[str, ...] = ("exact", "f1")
    max_new_tokens: int = 32
    stop: tuple[str, ...] = ("\n",)
    blank: str = ""
    normalise: str = "tokens"
    unconditional: str = ""
    description: str = ""
    separator: str = "\n\n"
    group: Column | None = None
    cut: Column | None = None
    detokenizer: str = ""
    folder: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    home: Path | None = None

    def __post_init__(self) -> None:
        self._one_of("kind", self.kind, KINDS)
        self._one_of("format", self.format, FORMATS)
        self._one_of("normalise", self.normalise, NORMALISATIONS)
        for split in self.files:
            self._one_of("a split in files", split, SPLITS)
        for metric in self.metrics:
            self._one_of("a metric", metric, METRICS)
        if self.detokenizer:
            self._one_of("detokenizer", self.detokenizer, tuple(DETOKENIZERS))
        self._need("test" in self.files or "validation" in self.files, "files name no test part")
        # A prompt that names the answer would give it away.
        told = {self.label, *self.references} & {*self.prompt.fields}
        self._need(not told, f"the prompt holds the answer, {', '.join(map(str, told))}")
        if self.kind in ("choice", "cloze"):
            self._need(self.label is not None, "label is missing")
        if self.kind == "choice":
            self._need(bool(self.choices or self.labels), "either choices or [labels] is wanted")
            if self.choices:
                right = all(map(_is_count, self.labels.values()))
                self._need(right, "labels of choices stand for numbers from 0")
            else:
                self._need(len(set(self.labels.values())) > 1, "[labels] name fewer than two")
        if self.kind == "cloze":
            self._need(bool(self.choices), "choices are missing")
            self._need(bool(self.blank), "blank is missing")
        if self.kind == "generation":
            self._need(bool(self.references), "references are missing")
            self._need(bool(self.metrics), "metrics must name at least one")
        self._need(self.answer.fields == ("answer",), "answer must hold {answer}, once and alone")
        self._need(all(self.stop), "stop must hold no empty string")
        once = self.cut is None or self.prompt.fields.count(self.cut) == 1
        self._need(once, "cut must name a field of the prompt that stands there once")
        if self.normalise == "unconditional":
            self._need(bool(self.unconditional), "unconditional is missing")

    @property
    def asked(self) -> str:
        """The split whose examples are asked, unless another is named."""
        return "test" if "test" in self.files else "validation"

    def data_folder(self, data: str | Path | None) -> Path:
        """The folder of the task's files: `data`, or for a task of a user's own its file's folder;
        else as `task_files.data_folder` says."""
        if data is None and self.home is not None:
            data = self.home / self.folder
        return task_files.data_folder(data, self.folder, self.files[self.asked])

    def _need(self, right: bool, wrong: str) -> None:
        if not right:
            raise ValueError(f"task {self.name}: {wrong}")

    def _one_of(self, what: str, value: str, names: tuple[str, ...]) -> None:
        check_name(f"task {self.name}: {what}", value, names)


def names() -> tuple[str, ...]:
    """The tasks that come with the package."""
    return task_files.names(_OWN)


def load_task(name: str | Path) -> Task:
    """The task called `name`, or described by the TOML file at this path.

    Raises ValueError for an unknown name and for a file that describes no task, FileNotFoundError
    for a path that is not there.
    """
    home = Path(name).parent if Path(name).suffix == ".toml" else None
    name, content = task_files.read(_OWN, name)
    where = f"task {name}"
    check_keys(where, content, _KEYS, _NEEDED)
    for key in content:
        kinds = _OF_KINDS.get(key, KINDS)
        if content["kind"] in KINDS and content["kind"] not in kinds:
            raise ValueError(f"{where}: {key} is of kind {' or '.join(kinds)} alone")
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
    for key in {"prompt", "answer"} & given.keys():
        try:
            given[key] = Template(given[key])
        except ValueError as error:
            raise ValueError(f"{where}: {key} {error}") from None
    return Task(name=name, home=home, **given)


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit()

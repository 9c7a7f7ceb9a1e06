"""Peak memory of ``get_peft_model`` with LoftQ on a model several times as large as the quantised one.

    python benchmarks/memory_adapt.py                     # a Llama of 0.65 GB in float32, 4 bits
    python benchmarks/memory_adapt.py --bits 4 2 --layers 24

Each run is a process of its own that makes the dense model in memory, resets the high-water mark of its
resident memory (Linux), adapts the model in place and reads the mark. A tool that makes the quantised model
beside the dense one would peak at least ``packed_weights`` higher. All figures are MB (1e6 bytes).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, save, table

_CHILD = """
import ctypes, json, sys, torch, transformers
from qlora_engine import LoftQConfig, LoraConfig, get_peft_model
from quant.linear import QuantizedModule

hidden, intermediate, layers, vocabulary, bits, rank, iters = map(int, sys.argv[1:])

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return 1024 * int(line.split()[1])

def llama(hidden, intermediate, layers):
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64)
    return transformers.LlamaForCausalLM(config)

def adapt(model):
    loftq = LoftQConfig(loftq_bits=bits, loftq_iter=iters)
    config = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights="loftq", loftq_config=loftq)
    return get_peft_model(model, config)

adapt(llama(256, 256, 1))  # what the libraries take
model = llama(hidden, intermediate, layers)
dense = sum(p.numel() * p.element_size() for p in model.parameters())
largest = 4 * hidden * intermediate
ctypes.CDLL("libc.so.6").malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark begins at what is resident now
before = status("VmRSS")
model = adapt(model)
peak = status("VmHWM")
ctypes.CDLL("libc.so.6").malloc_trim(0)
packed = sum(m.quantized().nbytes for m in model.modules() if isinstance(m, QuantizedModule))
left = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps(dict(
    dense_model=dense, packed_weights=packed, adapted_model=left, largest_layer=largest,
    resident_before=before, peak=peak, peak_above_before=peak - before, resident_after=status("VmRSS"))))
"""


def measure(arguments: argparse.Namespace, bits: int) -> dict[str, Any]:
    """The figures of one process, in MB."""
    names = ("hidden", "intermediate", "layers", "vocabulary", "bits", "rank", "iters")
    settings = {**vars(arguments), "bits": bits}
    command = [sys.executable, "-c", _CHILD, *(str(settings[name]) for name in names)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.stderr[-2000:])
    figures: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return {"bits": bits} | {name: round(value / 1e6, 1) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--iters", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    arguments = parser.parse_args()
    rows = [measure(arguments, bits) for bits in arguments.bits]
    print(table(rows))
    if arguments.json:
        save(arguments.json, command=sys.argv, rows=rows)


if __name__ == "__main__":
    main()

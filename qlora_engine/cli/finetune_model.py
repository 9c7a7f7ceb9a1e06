"""The model that ``qlora-finetune`` trains: found, quantised where it is dense, loaded with its adapter."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_engine import distributed
from qlora_engine.cli import common
from qlora_engine.cli.finetune_display import Display
from qlora_engine.errors import InputError, in_short
from qlora_engine.fingerprint import FINGERPRINT_FILE
from qlora_engine.tokenizer import read_tokenizer

_RANK = 16
_TARGETS = ("all-linear",)


@contextmanager
def base_and_adapter(
    name: str, options: dict[str, Any], output: Path, show: Display
) -> Iterator[tuple[Path, Path | None]]:
    """The folder of a quantised base and that of the adapter to go on from, None for a new one.

    A dense model is quantised by loftq-init's own code into OUTPUT/base (for --estimate, which leaves nothing
    behind, into a temporary folder), so that what was trained can be loaded, merged and resumed.

    Raises:
        InputError: no such model or adapter.
    """
    from qlora_engine.checkpoint import Checkpoint
    from qlora_engine.hub import find_adapter, find_model
    from qlora_engine.loading import check_quantised

    folder = find_model(name, code=options["trust_remote_code"])
    adapter = None if options["adapter"] is None else find_adapter(options["adapter"])
    if adapter is not None and not (adapter / "adapter_config.json").is_file():
        raise InputError(f"--adapter {adapter}: no adapter_config.json in it")
    solved = folder / "loftq_init"
    if adapter is None and (solved / "adapter_config.json").is_file():
        adapter = solved
    for taken, whose in ((folder, "model"), (adapter, "adapter")):
        if taken is not None and output.exists() and output.samefile(taken) and not options["estimate"]:
            raise InputError(f"--output {output} is the {whose}'s own folder; what is trained needs another")
    settings = Checkpoint.open(folder).config
    if settings.get("quantization_config") is not None:
        check_quantised(folder, settings["quantization_config"])
    if settings.get("is_encoder_decoder"):
        raise InputError(f"{folder} is an encoder-decoder; qlora-finetune trains causal language models")
    read_tokenizer(folder, trust_remote_code=options["trust_remote_code"])  # before a dense one is quantised
    if adapter is not None:
        _refuse(options, ("rank", "alpha", "target_modules"), f"{adapter} is trained, and has its own")
    if adapter is not None or settings.get("quantization_config") is not None:
        _refuse(options, ("bits",), "only a dense model is quantised, and only for a new adapter")
        yield folder, adapter
    elif options["estimate"]:
        with tempfile.TemporaryDirectory() as temporary:
            base = Path(distributed.from_main(lambda: temporary)) / "base"
            _quantise(folder, base, options, show, method="qlora")
            yield base, base / "loftq_init"
            distributed.barrier()
    else:
        base = output / "base"
        _check_base(base, options)
        _quantise(folder, base, options, show, method="loftq")
        yield base, base / "loftq_init"


def _check_base(base: Path, options: dict[str, Any]) -> None:
    """Refuse a base that a resumed run has not had, and one in the way that none has made."""
    made = (base / FINGERPRINT_FILE).is_file()
    if options["resume"] and not made:
        raise InputError(
            f"--resume: {base} is not there: that run's MODEL was another one, already quantised"
        )
    if options["overwrite"] and not made and base.is_dir() and any(base.iterdir()):
        raise InputError(
            f"{base} was not written by qlora-finetune, and its place is needed; give another --output"
        )


def _refuse(options: dict[str, Any], names: tuple[str, ...], why: str) -> None:
    given = [f"--{name.replace('_', '-')}" for name in names if options[name] not in (None, ())]
    if given:
        raise InputError(f"{', '.join(given)}: {why}; leave it out")


def _quantise(folder: Path, base: Path, options: dict[str, Any], show: Display, *, method: str) -> None:
    """What ``loftq-init folder base`` does; a base that this has made is used again."""
    from qlora_engine import pipeline
    from qlora_engine.architecture import read_architecture
    from qlora_engine.checkpoint import Checkpoint
    from qlora_engine.options import FORMAT_OF_BITS
    from qlora_engine.plan import make_plan

    bits = 4 if options["bits"] is None else options["bits"]
    if bits not in FORMAT_OF_BITS:
        raise InputError(f"--bits {bits}; allowed: {', '.join(map(str, FORMAT_OF_BITS))}")
    chosen = _new_adapter(
        options,
        method=method,
        format=FORMAT_OF_BITS[bits],
        seed=options["seed"],
        trust_remote_code=options["trust_remote_code"],
    )
    checkpoint = Checkpoint.open(folder)
    architecture = read_architecture(
        folder, checkpoint.config, trust_remote_code=options["trust_remote_code"]
    )
    plan = make_plan(checkpoint, architecture, chosen)
    show.say(f"quantising {folder} to {bits} bits: {base}")
    anew = options["overwrite"]
    device = device_of(options["device"])
    pipeline.run(plan, base, device=device, model=str(folder), overwrite=anew, resume=not anew)


def _new_adapter(options: dict[str, Any], **more: Any) -> Any:
    """What the options say of an adapter that is to be made, checked as loftq-init does."""
    from qlora_engine.options import InitOptions

    return InitOptions(
        rank=_RANK if options["rank"] is None else options["rank"],
        alpha=options["alpha"],
        target_modules=common.parse_targets("--target-modules", options["target_modules"] or _TARGETS),
        **more,
    )


def load(folder: Path, adapter: Path | None, options: dict[str, Any]) -> tuple[Any, Any]:
    """The model with the adapter to train, on its device (or sharded), and its tokenizer.

    Args:
        folder: A quantised base, or a dense one that an adapter belongs to.
        adapter: To go on from; None: a new one.
        options: The command's.

    Raises:
        InputError: no such device, or a model that cannot be sharded.
    """
    import torch

    from qlora_engine import LoraConfig, get_peft_model
    from qlora_engine.disk_adapter import DiskAdapter
    from qlora_engine.loading import from_pretrained
    from qlora_engine.training import host
    from qlora_engine.training.settings import precision_of
    from qlora_engine.training.sharding import load_sharded

    device = device_of(options["device"])
    precision = precision_of(options["precision"], device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    trust = options["trust_remote_code"]
    tokenizer = read_tokenizer(folder, trust_remote_code=trust)
    if adapter is not None:
        config = DiskAdapter.open(adapter, to_merge=False).config
        if config.lora_alpha == 0:
            raise InputError(f"{adapter}: lora_alpha is 0; such factors have no effect, and learn nothing")
        config.inference_mode = False
        if folder.parent.name != "snapshots":  # not of the hub's cache: the base is where it lies now
            config.base_model_name_or_path = str(folder)
    else:
        chosen = _new_adapter(options)
        targets = chosen.target_modules
        config = LoraConfig(
            r=chosen.rank,
            lora_alpha=chosen.lora_alpha,
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type="CAUSAL_LM",
            base_model_name_or_path=str(folder),
        )
    if options["dropout"] is not None:
        if not 0 <= options["dropout"] < 1:
            raise InputError(f"--dropout {options['dropout']}; it must be in [0, 1)")
        config.lora_dropout = options["dropout"]
    torch.manual_seed(options["seed"])
    if options["shard"]:
        model = load_sharded(
            folder,
            config,
            adapter,
            dtype=dtype,
            device=device,
            seed=options["seed"],
            embedding_on_host="embedding" in host.parse_offload(options["offload"]),
            trust_remote_code=trust,
        )
        return model, tokenizer
    base = from_pretrained(folder, dtype=dtype, trust_remote_code=trust)
    if base.get_output_embeddings() is None:
        raise InputError(
            f"{folder}: {type(base).__name__} predicts no tokens; a causal language model is needed"
        )
    if "embedding" in host.parse_offload(options["offload"]):
        host.embedding_to_host(base)  # before anything is on the GPU
    if adapter is not None:
        return _adapted(base.to(device), adapter, config), tokenizer
    try:
        return get_peft_model(base.to(device), config), tokenizer
    except ValueError as error:
        raise InputError(f"{folder}: {error}") from error


def _adapted(base: Any, adapter: Path, config: Any) -> Any:
    """The model with an adapter whose every tensor found its place.

    Raises:
        InputError: the adapter's config or tensors do not fit the model.
    """
    from qlora_engine import PeftModel
    from qlora_engine.peft_files import AdapterKeysWarning

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", AdapterKeysWarning)
            return PeftModel.from_pretrained(base, str(adapter), is_trainable=True, config=config)
    except (ValueError, TypeError, KeyError, RuntimeError, AdapterKeysWarning) as error:
        raise InputError(f"{adapter} does not fit this model: {in_short(error):.300}") from error


def device_of(name: str) -> Any:
    """The torch.device that ``--device`` means to this process.

    Raises:
        InputError: another word, or no such GPU.
    """
    import torch

    if name == "auto":
        local = distributed.world().local_rank
        return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    allowed = f"--device {name!r}; allowed: auto, cpu, cuda, cuda:N"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(allowed) from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(allowed)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: no CUDA GPU is visible")
    if device.type == "cuda" and distributed.world().size > 1:
        return torch.device("cuda", distributed.world().local_rank)
    return device

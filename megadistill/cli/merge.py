"""``megadistill merge BASE ADAPTER FOLDER``."""

from __future__ import annotations

from collections.abc import Sequence

from megadistill.cli.parsing import Parser, refuse_unwritable


def run(arguments: Sequence[str]) -> int:
    """Runs the verb; returns its exit code."""
    parser = Parser(
        "merge",
        "Merges a LoRA adapter (peft) into its base model and writes a Hugging Face folder that needs no peft:\n"
        "weights (safetensors), configuration, generation configuration, tokenizer (the adapter's, else the base's).",
        "examples:\n"
        "  megadistill merge models/base lora/checkpoint-100 merged/model\n"
        "  python tools/merge_lora.py models/base lora/checkpoint-100 merged/model --dtype bf16\n\n"
        "Layers are merged in float32 and rounded once. The base is held in memory in its own type; no GPU is used.",
    )
    parser.add_argument("base", metavar="BASE", help="model folder, hub name, checkpoint or run directory")
    parser.add_argument(
        "adapter", metavar="ADAPTER",
        help="folder with adapter_config.json and adapter_model.safetensors; a run with model.student.lora",
    )  # fmt: skip
    parser.add_new_folder()
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="type of the weights written; default: the base's")
    parsed = parser.parse(arguments)
    refuse_unwritable(parsed.folder, is_file=False)

    from megadistill.launch.world import name_accelerator

    name_accelerator()  # before anything imports DeepSpeed, which would print its guess
    from megadistill.checkpoint.merge import merge_adapter
    from megadistill.checkpoint.model_folder import model_folder

    merge_adapter(model_folder(parsed.base), model_folder(parsed.adapter), parsed.folder, dtype=parsed.dtype)
    print(f"merged {parsed.adapter} into {parsed.base}: {parsed.folder}")
    return 0

"""Keys by the names that other trainers have for them: what an unknown key meant, and the tables of coming_from.md.

The names are those of transformers' TrainingArguments, TRL's SFTConfig, GKDConfig and GOLDConfig, LLaMA-Factory's
arguments, torchtune's knowledge distillation recipe, and verl's configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megadistill.config.fields import walk
from megadistill.files import nearest

_NEAR = 0.85


@dataclass(frozen=True)
class Name:
    """A setting of another trainer.

    Attributes:
        name: What it is called there; with dots where it is in a section there.
        keys: Our keys for it; none where there is no counterpart.
        word: A sentence where the two are not the same, or why there is none.
    """

    name: str
    keys: tuple[str, ...] = ()
    word: str = ""

    @property
    def hint(self) -> str:
        """The end of a message about an unknown key."""
        *others, last = self.keys or ("",)
        question = f"did you mean {', '.join(others)}{' or ' if others else ''}{last}?" if last else ""
        return " ".join(filter(None, (question, self.word)))


_DTYPES = ("model.student.dtype", "model.teacher.dtype")
_GLOBAL_BATCH = "It counts the examples of a step over all processes"
_LORA = "0 trains all weights; megadistill merge BASE ADAPTER FOLDER merges an adapter to start from"
_NO_DROPOUT = "dropout is always off, also in adapters"
_NO_DORA = "there is no DoRA: its norms of whole rows would be reduced in every layer; LoRA and rsLoRA are there"
_QUANTIZED = "quantized models are not trained and not read: fp32 or bf16 (model.student.dtype, model.teacher.dtype)"
_TRACKERS = "wandb, trackio, mlflow; TensorBoard's events and metrics.jsonl are always in run.dir"
_ENGINE = "no key is needed: the training processes write the student's text themselves, without an inference engine"
_REWARDS = "there is no counterpart: nothing is learned from rewards, and there is no critic"
_LAUNCHER = "the launcher decides it: docs/launching.md"
_MAX_TOKENS = "It limits prompt plus response; data.max_prompt_tokens limits the prompt"
_ONE_PATH = "One file, folder or hub data set; a folder is read with all its files"
_SPLIT = "Rows of their own: megadistill prepare --valid N sets them aside"
_ROWS = "megadistill prepare --max-rows N keeps the first N rows"
_PACKED = "Sequences of a pass follow one another without padding; none is cut or joined with another"
_ADAMW = "the optimizer is always AdamW, with the keys of the section optim"

TRAINER = (
    Name("output_dir", ("run.dir",)),
    Name("overwrite_output_dir", ("train.resume",), "train.resume=never starts anew, in a run.dir that holds no run"),
    Name("run_name", ("run.dir",), "A run is called by its folder"),
    Name("logging_dir", ("run.dir",), "Events are beside everything else of a run"),
    Name("seed", ("run.seed",)),
    Name("data_seed", ("run.seed",), "One seed for everything random"),
    Name("learning_rate", ("optim.lr",)),
    Name("lr_scheduler_type", ("optim.schedule",)),
    Name("warmup_steps", ("optim.warmup_steps",)),
    Name("warmup_ratio", ("optim.warmup_ratio",)),
    Name("weight_decay", ("optim.weight_decay",)),
    Name("max_grad_norm", ("optim.gradient_clipping",)),
    Name("adam_beta1", ("optim.betas",), "Both decay rates: optim.betas=[0.9, 0.95]"),
    Name("adam_beta2", ("optim.betas",), "Both decay rates: optim.betas=[0.9, 0.95]"),
    Name("adam_epsilon", ("optim.eps",)),
    Name("optim", (), _ADAMW),
    Name("max_steps", ("train.max_steps",)),
    Name("num_train_epochs", ("train.epochs",)),
    Name("per_device_train_batch_size", ("train.micro_batch_size",), "train.global_batch_size is that of a whole step"),
    Name(
        "gradient_accumulation_steps",
        ("train.global_batch_size",),
        f"{_GLOBAL_BATCH}: train.micro_batch_size x gradient accumulation x data-parallel ranks",
    ),
    Name("per_device_eval_batch_size", ("eval.batch_size",)),
    Name("auto_find_batch_size", (), "there is no counterpart: lower train.micro_batch_size where memory is short"),
    Name("save_steps", ("train.save_every",), "0 saves at the end only"),
    Name("save_strategy", ("train.save_every",), "A number of steps; 0 saves at the end only"),
    Name("save_total_limit", ("checkpoint.keep_last",)),
    Name("load_best_model_at_end", ("checkpoint.keep_best",)),
    Name("metric_for_best_model", ("checkpoint.keep_best",)),
    Name("early_stopping_patience", ("train.early_stopping",)),
    Name("eval_steps", ("train.eval_every",), "0 never validates"),
    Name("eval_strategy", ("train.eval_every",), "A number of steps; 0 never validates"),
    Name("logging_steps", ("train.log_every",), "For the progress bar; metrics.jsonl has every step"),
    Name("report_to", ("run.trackers",), _TRACKERS),
    Name("resume_from_checkpoint", ("train.resume",), "auto (the default), never, or a checkpoint's path"),
    Name("bf16", _DTYPES, "bf16=true is model.student.dtype=bf16"),
    Name("fp16", _DTYPES, "There is no float16: bf16 or fp32"),
    Name("gradient_checkpointing", ("model.gradient_checkpointing",)),
    Name(
        "deepspeed", ("deepspeed",), "A mapping of DeepSpeed's own keys, not a file; the stage is parallel.zero_stage"
    ),
    Name("fsdp", ("parallel.zero_stage",), "DeepSpeed ZeRO partitions the models"),
    Name("ddp_timeout", ("parallel.timeout_s",)),
    Name("torch_compile", ("loss.backend",), "loss.backend=compile compiles the losses; models are not compiled"),
    Name("use_liger_kernel", ("loss.backend",), "The losses never hold the logits of all tokens, whatever runs them"),
    Name("dataloader_num_workers", (), "no key is needed: rows are tokenized before training and held in memory"),
    Name("label_smoothing_factor", (), "there is no counterpart: labels are not smoothed"),
    Name("neftune_noise_alpha", (), "there is no counterpart: no noise is added to embeddings"),
    Name("push_to_hub", (), "there is no counterpart: megadistill export --push uploads a finished student"),
)
TRL = (
    Name("model_name_or_path", ("model.student.path",)),
    Name("teacher_model_name_or_path", ("model.teacher.path",)),
    Name("model_revision", ("model.student.revision",)),
    Name("teacher_model_revision", ("model.teacher.revision",)),
    Name("teacher_model_init_kwargs", ("model.teacher.dtype",)),
    Name("teacher_tokenizer_name_or_path", ("model.tokenizer",), "Teacher and student share one tokenizer"),
    Name("dtype", _DTYPES),
    Name("torch_dtype", _DTYPES),
    Name("attn_implementation", ("model.attention",)),
    Name("dataset_name", ("data.train_path",), _ONE_PATH),
    Name("dataset_config", ("data.hub_config",)),
    Name("dataset_train_split", ("data.hub_split",)),
    Name("dataset_test_split", ("data.valid_path",), _SPLIT),
    Name("dataset_text_field", ("data.instruction_field", "data.output_field"), "A row is a prompt and its reference"),
    Name("dataset_num_proc", (), "no key is needed: megadistill prepare under mpirun shares the tokenization"),
    Name("max_length", ("data.max_tokens",), _MAX_TOKENS),
    Name("max_seq_length", ("data.max_tokens",), _MAX_TOKENS),
    Name("max_prompt_length", ("data.max_prompt_tokens",)),
    Name(
        "truncation_mode",
        ("data.long_prompt",),
        "drop | truncate | truncate_end | error; long responses lose their end",
    ),
    Name("packing", ("train.padding_free",), _PACKED),
    Name("padding_free", ("train.padding_free",)),
    Name("chat_template_path", ("data.chat_template",)),
    Name("eos_token", ("model.eos_tokens",)),
    Name("completion_only_loss", (), "no key is needed: the losses are on responses only"),
    Name("assistant_only_loss", ("data.train_on",), "The losses are on the assistant's text only"),
    Name(
        "temperature",
        ("generation.sampling_temperature", "eval.temperature", "loss.temperature"),
        "For the student's text, for evaluation, and for both distributions in the token loss",
    ),
    Name("top_p", ("generation.top_p", "eval.top_p")),
    Name("top_k", ("generation.top_k", "eval.top_k"), "loss.top_k is something else: what the gate sees"),
    Name("max_new_tokens", ("generation.max_new_tokens", "eval.max_new_tokens"), "In training, and in evaluation"),
    Name("max_completion_length", ("generation.max_new_tokens",)),
    Name(
        "lmbda",
        ("generation.student_ratio",),
        "With generation.mode=mixed; 1 is generation.mode=on_policy, 0 is generation.mode=dataset",
    ),
    Name(
        "beta",
        ("loss.divergence",),
        "beta=0 is forward_kl, 1 is reverse_kl, between them jensen_shannon with loss.jensen_shannon_beta",
    ),
    Name("seq_kd", ("generation.mode",), "seq_kd=true is generation.mode=teacher"),
    Name("disable_dropout", (), "no key is needed: dropout is always off"),
    Name("num_generations", (), "there is no counterpart: a prompt gets one response a step"),
    Name("use_uld_loss", (), "there is no loss across tokenizers: teacher and student share one (model.tokenizer)"),
    Name("uld_distillation_weight", (), "there is no loss across tokenizers; the weights are in the section loss"),
    Name("use_vllm", (), _ENGINE),
    Name("vllm_mode", (), _ENGINE),
    Name("vllm_gpu_memory_utilization", ("generation.max_cache_bytes",), _ENGINE),
    Name("use_peft", ("model.student.lora.r",), _LORA),
    Name("lora_r", ("model.student.lora.r",), _LORA),
    Name("lora_alpha", ("model.student.lora.alpha",)),
    Name("lora_dropout", (), _NO_DROPOUT),
    Name("lora_target_modules", ("model.student.lora.targets",), "None named: all linear layers below the head"),
    Name("load_in_4bit", (), _QUANTIZED),
    Name("load_in_8bit", (), _QUANTIZED),
)
LLAMA_FACTORY = (
    Name("stage", ("generation.mode",), "Plain SFT is loss.dac_kl=0 loss.span=0 generation.mode=dataset"),
    Name("finetuning_type", ("model.student.lora.r",), _LORA),
    Name("lora_rank", ("model.student.lora.r",), _LORA),
    Name("lora_target", ("model.student.lora.targets",), "None named: all linear layers below the head"),
    Name("adapter_name_or_path", ("model.student.path",), "A run continues from its own; others are merged first"),
    Name("quantization_bit", (), _QUANTIZED),
    Name("dataset", ("data.train_path",), _ONE_PATH),
    Name("dataset_dir", ("data.train_path",), _ONE_PATH),
    Name("eval_dataset", ("data.valid_path",)),
    Name("val_size", ("data.valid_path",), _SPLIT),
    Name("template", ("data.template",)),
    Name("cutoff_len", ("data.max_tokens",), _MAX_TOKENS),
    Name("max_samples", (), _ROWS),
    Name("mix_strategy", ("data.prompts_ratio",), "One data set is trained on; data.prompts_path adds prompts to it"),
    Name("interleave_probs", ("data.prompts_ratio",), "The share of data.prompts_path in a global batch"),
    Name("train_on_prompt", (), "there is no counterpart: the losses are on responses only"),
    Name("mask_history", ("data.train_on",), "mask_history=true is data.train_on=last"),
    Name("neat_packing", ("train.padding_free",), _PACKED),
    Name("streaming", (), "there is no counterpart: rows are tokenized before training and held in memory"),
    Name("preprocessing_num_workers", (), "no key is needed: megadistill prepare under mpirun shares the tokenization"),
    Name("flash_attn", ("model.attention",)),
    Name("plot_loss", (), "no key is needed: megadistill plot RUN.DIR draws the losses"),
)
TORCHTUNE = (
    Name("checkpointer.checkpoint_dir", ("model.student.path",)),
    Name("teacher_checkpointer.checkpoint_dir", ("model.teacher.path",)),
    Name("checkpointer", ("model.student.path",)),
    Name("teacher_checkpointer", ("model.teacher.path",)),
    Name("teacher_model", ("model.teacher.path",)),
    Name("model._component_", ("model.student.path",), "A folder whose config.json names the model"),
    Name("model.lora_attn_modules", ("model.student.lora.targets",)),
    Name("model.apply_lora_to_mlp", ("model.student.lora.targets",)),
    Name("model.lora_rank", ("model.student.lora.r",), _LORA),
    Name("tokenizer.path", ("model.tokenizer",), "A folder or a hub name"),
    Name("tokenizer.max_seq_len", ("data.max_tokens",), _MAX_TOKENS),
    Name("tokenizer", ("model.tokenizer",), "A folder or a hub name"),
    Name("dataset.packed", ("train.padding_free",), _PACKED),
    Name("shuffle", (), "no key is needed: rows are always shuffled, by run.seed"),
    Name("batch_size", ("train.micro_batch_size", "train.global_batch_size"), "On one rank, and of a whole step"),
    Name("optimizer.lr", ("optim.lr",)),
    Name("optimizer.weight_decay", ("optim.weight_decay",)),
    Name("optimizer", (), _ADAMW),
    Name("lr_scheduler.num_warmup_steps", ("optim.warmup_steps",)),
    Name("lr_scheduler", ("optim.schedule",)),
    Name("kd_loss", ("loss.divergence",)),
    Name("kd_ratio", ("loss.dac_kl", "loss.sft"), "kd_ratio=0.3 is loss.dac_kl=0.3 loss.sft=0.7"),
    Name("epochs", ("train.epochs",)),
    Name("max_steps_per_epoch", ("train.max_steps",), "It counts the steps of the whole run"),
    Name("clip_grad_norm", ("optim.gradient_clipping",)),
    Name("compile", ("loss.backend",), "loss.backend=compile compiles the losses; models are not compiled"),
    Name("enable_activation_checkpointing", ("model.gradient_checkpointing",)),
    Name("enable_activation_offloading", (), "there is no counterpart: activations are recomputed, not offloaded"),
    Name("device", (), "no key is needed: the GPU where there is one"),
    Name("metric_logger", ("run.trackers",), _TRACKERS),
    Name("log_every_n_steps", ("train.log_every",), "For the progress bar; metrics.jsonl has every step"),
    Name("log_peak_memory_stats", (), "no key is needed: metrics.jsonl has the peak"),
    Name("profiler", ("train.profile_steps",), "First and last step"),
)
_ACTOR, _ROLLOUT, _LOSS = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "distillation.distillation_loss"
VERL = (
    Name("data.train_files", ("data.train_path",), _ONE_PATH),
    Name("data.val_files", ("data.valid_path",), _ONE_PATH),
    Name("data.train_max_samples", (), _ROWS),
    Name("data.prompt_key", ("data.instruction_field",)),
    Name("data.response_key", ("data.output_field",)),
    Name("data.max_response_length", ("generation.max_new_tokens",), "data.max_tokens limits prompt plus response"),
    Name("data.filter_overlong_prompts", ("data.long_prompt",), "drop is the default"),
    Name("data.truncation", ("data.long_prompt",), "drop | truncate | truncate_end | error"),
    Name("data.train_batch_size", ("train.global_batch_size",)),
    Name("data.micro_batch_size_per_gpu", ("train.micro_batch_size",)),
    Name("data.apply_chat_template_kwargs", ("data.chat_template_kwargs",)),
    Name("actor_rollout_ref.model.path", ("model.student.path",)),
    Name("actor_rollout_ref.model.enable_gradient_checkpointing", ("model.gradient_checkpointing",)),
    Name(f"{_ACTOR}.optim.lr", ("optim.lr",)),
    Name(f"{_ACTOR}.optim.lr_warmup_steps", ("optim.warmup_steps",)),
    Name(f"{_ACTOR}.optim.lr_warmup_steps_ratio", ("optim.warmup_ratio",)),
    Name(f"{_ACTOR}.optim.warmup_style", ("optim.schedule",)),
    Name(f"{_ACTOR}.optim.weight_decay", ("optim.weight_decay",)),
    Name(f"{_ACTOR}.optim.min_lr_ratio", ("optim.min_lr_ratio",)),
    Name(f"{_ACTOR}.grad_clip", ("optim.gradient_clipping",)),
    Name(f"{_ACTOR}.ppo_mini_batch_size", ("train.global_batch_size",), _GLOBAL_BATCH),
    Name(f"{_ACTOR}.ppo_micro_batch_size_per_gpu", ("train.micro_batch_size",)),
    Name(f"{_ACTOR}.ppo_max_token_len_per_gpu", ("train.micro_batch_tokens",)),
    Name(f"{_ACTOR}.fsdp_config.param_offload", ("deepspeed",), "deepspeed.zero_optimization.offload_param"),
    Name(f"{_ACTOR}.fsdp_config.optimizer_offload", ("parallel.offload",), "parallel.offload=optimizer"),
    Name(f"{_ROLLOUT}.temperature", ("generation.sampling_temperature",)),
    Name(f"{_ROLLOUT}.top_p", ("generation.top_p",)),
    Name(f"{_ROLLOUT}.top_k", ("generation.top_k",), "0 keeps all tokens, not -1"),
    Name(f"{_ROLLOUT}.response_length", ("generation.max_new_tokens",)),
    Name(f"{_ROLLOUT}.tensor_model_parallel_size", ("parallel.tp_size",), "One size, for text and training"),
    Name(f"{_ROLLOUT}.gpu_memory_utilization", ("generation.max_cache_bytes",), "In bytes of each process"),
    Name(f"{_ROLLOUT}.val_kwargs.temperature", ("eval.temperature",)),
    Name(f"{_ROLLOUT}.n", (), "there is no counterpart: a prompt gets one response a step"),
    Name(_ROLLOUT, (), _ENGINE),
    Name("distillation.teacher_models.teacher_model.model_path", ("model.teacher.path",)),
    Name(f"{_LOSS}.loss_mode", ("loss.divergence",)),
    Name(f"{_LOSS}.topk", (), "no key is needed: the token loss sees the teacher's whole distribution"),
    Name(f"{_LOSS}.distillation_loss_coef", ("loss.dac_kl",)),
    Name("optim.lr_warmup_steps_ratio", ("optim.warmup_ratio",)),
    Name("optim.clip_grad", ("optim.gradient_clipping",)),
    Name("trainer.total_epochs", ("train.epochs",)),
    Name("trainer.total_training_steps", ("train.max_steps",)),
    Name("trainer.default_local_dir", ("run.dir",)),
    Name("trainer.project_name", ("run.project",)),
    Name("trainer.experiment_name", ("run.dir",), "A run is called by its folder"),
    Name("trainer.logger", ("run.trackers",), _TRACKERS),
    Name("trainer.save_freq", ("train.save_every",), "0 saves at the end only, not -1"),
    Name("trainer.test_freq", ("train.eval_every",), "0 never validates, not -1"),
    Name("trainer.max_ckpt_to_keep", ("checkpoint.keep_last",)),
    Name("trainer.max_actor_ckpt_to_keep", ("checkpoint.keep_last",)),
    Name("trainer.resume_mode", ("train.resume",), "auto, never, or a checkpoint's path"),
    Name("trainer.resume_from_path", ("train.resume",)),
    Name("trainer.n_gpus_per_node", (), _LAUNCHER),
    Name("trainer.nnodes", (), _LAUNCHER),
    Name("algorithm", (), _REWARDS),
    Name("critic", (), _REWARDS),
    Name("reward_model", (), _REWARDS),
)
# What people write from memory, and what is not one-to-one in this project itself.
_SHARED_TP = "teacher and student share parallel.tp_size: the losses compare the same vocabulary shard of both"
_SPOKEN = (
    *(Name(name, (), _SHARED_TP) for name in ("teacher_tp_size", "student_tp_size", "teacher.tp_size")),
    Name("student.tp_size", (), _SHARED_TP),
    *(Name(name, ("train.epochs",)) for name in ("num_epochs", "max_epochs", "n_epochs")),
    *(Name(name, ("model.student.lora.r",), _LORA) for name in ("lora", "peft", "adapter", "lora.rank", "lora_rank")),
    Name("qlora", ("model.student.lora.r",), _QUANTIZED),
    *(Name(name, (), _NO_DORA) for name in ("use_dora", "dora", "lora.use_dora")),
    *(Name(name, (), _NO_DROPOUT) for name in ("lora.dropout", "lora.lora_dropout")),
    *(Name(name, ("run.trackers",), _TRACKERS) for name in ("wandb", "mlflow", "trackio", "tracker")),
    *(Name(name, ("run.project",)) for name in ("wandb_project", "project_name")),
    Name("tensorboard", (), "no key is needed: run.dir always holds its events, and metrics.jsonl"),
    *(Name(name, _DTYPES) for name in ("precision", "mixed_precision")),
    *(Name(name, ("optim.gradient_dtype",)) for name in ("grad_accum_dtype", "communication_data_type", "grad_dtype")),
    *(Name(name, ("parallel.offload",)) for name in ("offload_optimizer", "cpu_offload", "optimizer_offload")),
    *(Name(name, ("model.student.path",)) for name in ("student", "student_model", "model_path", "model_name")),
    *(Name(name, ("model.teacher.path",)) for name in ("teacher", "teacher_model_path", "teacher_name")),
    Name("evaluation_strategy", ("train.eval_every",), "A number of steps; 0 never validates"),
    Name("tokenizer_name", ("model.tokenizer",)),
    Name("grad_accum_steps", ("train.global_batch_size",), _GLOBAL_BATCH),
)
# Title on docs/coming_from.md -> its rows.
TABLES: Mapping[str, tuple[Name, ...]] = {
    "transformers' Trainer, and what TRL and LLaMA-Factory take from it": TRAINER,
    "TRL: SFT, GKD, GOLD": TRL,
    "LLaMA-Factory": LLAMA_FACTORY,
    "torchtune: knowledge distillation": TORCHTUNE,
    "verl": VERL,
}


def other_name(key: str, value: Any = None) -> tuple[str, Name] | None:
    """What an unknown key is in another trainer, under whatever section it was typed; None where it is nothing known.

    Args:
        key: The unknown key, maybe with the leading dashes of an option.
        value: Its value: where that is a section, the first key in it is what was typed.

    Returns:
        The key that was typed, and what it is.
    """
    known, typed = _by_name(), _typed(key, value)
    # Whole names first: critic.optim.lr is one of the critic, not of "optim".
    for first, last in ((0, 1), (1, None)):
        for path in reversed(typed):
            parts = path.lstrip("-").replace("-", "_").split(".")
            for start in range(len(parts))[first:last]:
                if (name := ".".join(parts[start:])) in known:
                    return path, known[name]
    own = {name.rpartition(".")[2] for name, _ in walk()}
    near = nearest(key.rpartition(".")[2], set(known) - own, cutoff=_NEAR)
    return None if near is None else (key, known[near])


def _typed(key: str, value: Any) -> list[str]:
    """The unknown key, and what is in it down to a first leaf."""
    typed = [key]
    while isinstance(value, dict) and value:
        name, value = next(iter(value.items()))
        typed.append(f"{typed[-1]}.{name}")
    return typed


def _by_name() -> dict[str, Name]:
    """Every name of every table; the first one wins, and one that is also ours in the same words is left out.

    The last part of a name with dots counts too, where it has an underscore (``save_freq``, not ``n``) and one meaning.
    """
    rows = [row for table in (*TABLES.values(), _SPOKEN) for row in table]
    rows = [row for row in rows if [key.rpartition(".")[2] for key in row.keys] != [row.name]]
    known: dict[str, Name] = {}
    by_last: dict[str, list[Name]] = {}
    for row in rows:
        known.setdefault(row.name, row)
        by_last.setdefault(row.name.rpartition(".")[2], []).append(row)
    for last, same in by_last.items():
        if "_" in last.strip("_") and len({row.keys for row in same}) == 1:
            known.setdefault(last, same[0])
    return known

"""What is said of a flag that there is not: the right one's name, also for the words of other tools."""

import difflib
from collections.abc import Collection

from launch.config.limits import NEVER_USED, NOT_RESUMABLE, NOT_WITH_DEEPSPEED, REFUSED

# flag here: what it is called elsewhere
ELSEWHERE = {
    "resume_from_checkpoint": "resume resume_from resume_path load load_checkpoint ckpt ckpt_path checkpoint "
    "checkpoint_path restore continue_from",
    "model": "model_name model_name_or_path base_model pretrained_model_name_or_path model_path model_id pretrained",
    "data": "dataset datasets dataset_name dataset_path data_path data_dir train_data train_file train_dataset "
    "train_path training_data split train_split dataset_split subset dataset_config dataset_config_name",
    "eval_data": "eval_dataset eval_file val_data val_file valid_data validation_data validation_file test_data "
    "val valid validation test eval_path val_path",
    "max_rows": "max_samples max_train_samples limit n_rows num_rows",
    "columns": "prompt_column completion_column response_column text_column input_column output_column label_column "
    "text_field dataset_text_field column column_map",
    "chat_template": "template prompt_template",
    "data_workers": "num_proc dataset_num_proc preprocessing_num_workers preprocessing_workers",
    "data_cache": "cache_dir cache dataset_cache",
    "eval_fraction": "val_size test_size val_set_size eval_ratio validation_split validation_split_percentage",
    "max_length": "max_seq_length max_seq_len seq_length seq_len sequence_len sequence_length cutoff_len block_size "
    "model_max_length context_length max_tokens",
    "tokenizer_size": "vocab_size",
    "smoothing": "label_smoothing label_smoothing_eps smoothing_factor epsilon ls",
    "head": "loss loss_head fused",
    "lora_rank": "lora lora_r use_lora use_peft peft peft_type adapter finetuning_type",
    "lora_targets": "lora_target lora_target_modules target_modules",
    "dora": "use_dora",
    "merge_adapter": "merge merge_lora merge_and_unload",
    "tp": "tensor_parallel tensor_parallel_size tensor_model_parallel_size tp_size autotp_size",
    "zero": "zero_stage stage",
    "offload": "cpu_offload offload_optimizer offload_param zero_offload",
    "deepspeed": "deepspeed_config ds_config deepspeed_file config_deepspeed",
    "recipe": "config config_file config_path cfg yaml",
    "output_dir": "output out out_dir save_dir save_path run_dir experiment_dir output_path",
    "sanity": "check dry_run sanity_check validate test_run",
    "samples": "num_samples n_samples",
    "stall_timeout": "timeout nccl_timeout dist_timeout",
    "num_train_epochs": "epoch epochs num_epochs n_epochs max_epochs train_epochs",
    "max_steps": "steps num_steps train_steps total_steps max_train_steps num_training_steps train_iters max_iters "
    "iterations",
    "per_device_train_batch_size": "batch_size bs mbs batch micro_batch_size micro_batch train_batch_size "
    "per_gpu_train_batch_size train_micro_batch_size_per_gpu per_device_batch_size per_device_batchsize "
    "global_batch_size",
    "per_device_eval_batch_size": "eval_batch_size val_batch_size per_gpu_eval_batch_size",
    "gradient_accumulation_steps": "grad_accum grad_accum_steps grad_acc_steps grad_accumulation accumulation_steps "
    "gradient_accumulation accumulate_grad_batches",
    "learning_rate": "lr peak_lr max_lr base_lr",
    "warmup_steps": "warmup warmup_ratio warmup_iters num_warmup_steps lr_warmup_steps",
    "lr_scheduler_type": "scheduler scheduler_type lr_scheduler lr_schedule lr_decay_style",
    "adam_beta1": "beta1 betas",
    "adam_beta2": "beta2",
    "adam_epsilon": "eps adam_eps",
    "max_grad_norm": "clip clip_grad clip_grad_norm grad_clip gradient_clipping gradient_clip_val max_norm",
    "weight_decay": "wd decay",
    "optim": "optimizer optimiser",
    "eval_strategy": "evaluation_strategy do_eval_only eval_only evaluate eval",
    "eval_steps": "eval_every eval_interval eval_freq val_check_interval evaluate_every",
    "save_steps": "save_every save_interval save_freq checkpoint_interval checkpoint_every",
    "logging_steps": "log_every log_interval log_steps log_freq log_every_n_steps",
    "save_total_limit": "keep keep_last max_checkpoints",
    "seed": "random_seed rng_seed",
    "bf16": "mixed_precision precision dtype torch_dtype bfloat16 half amp fp32 float32",
    "use_cpu": "cpu no_cuda force_cpu",
    "torch_compile": "compile",
    "neftune_noise_alpha": "neftune neftune_alpha",
    "log_level": "verbose verbosity quiet",
    "run_name": "name wandb_name wandb_run_name",
    "gradient_checkpointing": "grad_checkpointing use_gradient_checkpointing recompute",
    "report_to": "wandb tracker trackers tensorboard logger log_with",
    "dataloader_num_workers": "num_workers workers",
    "dataloader_drop_last": "drop_last",
    "attn_implementation": "attention attn flash_attn use_flash_attention use_flash_attention_2 flash_attention "
    "flash_attention_2",
}
LIKE = {word: flag for flag, words in ELSEWHERE.items() for word in words.split()}
MORE = {
    "resume": "the same command with the same --output_dir resumes by itself",
    "do_eval_only": "a run trains; `python launch/evaluate.py --model DIR --data FILE` evaluates a model",
    "validation_split_percentage": "a share, below 1",
    "split": "--data owner/name:split",
    "train_split": "--data owner/name:split",
    "dataset_split": "--data owner/name:split",
    "subset": "--data owner/name:config:split",
    "dataset_config": "--data owner/name:config:split",
    "dataset_config_name": "--data owner/name:config:split",
    "prompt_column": "--columns prompt=question,completion=answer",
    "betas": "and 'adam_beta2'",
    "fp32": "without it, and without --fp16, training is in fp32",
    "cache_dir": "of prepared rows; models are kept where HF_HOME says",
    "eval_only": "a run trains; `python launch/evaluate.py --model DIR --data FILE` evaluates a model",
    "warmup_ratio": "below 1 it is a share of all steps",
    "global_batch_size": "times --gradient_accumulation_steps and the data-parallel ranks",
    "mixed_precision": "--bf16 true or --fp16 true",
    "use_lora": "16 is usual",
    "wandb": "--report_to wandb",
    "tensorboard": "--report_to tensorboard",
}
NOT_OFFERED = {
    "only the base of adapters is quantised: --lora_rank 16 --load_in_4bit true; or try --zero 3 --offload": "qlora "
    "quantize load_in_8bit quantization quantization_bit bnb_4bit_quant_type",
    "class weights are not offered: every label counts alike": "class_weight class_weights label_weights",
    "pipeline, context and expert parallelism are not offered; --tp and --zero share a model": "pp pp_size "
    "pipeline_parallel_size pipeline_model_parallel_size cp cp_size context_parallel_size ep ep_size",
    "it is the launcher's, and stands before the script: deepspeed --num_gpus 2 launch/sft.py": "num_gpus num_nodes "
    "nproc_per_node nnodes node_rank hostfile master_addr master_port include exclude gpus gpu nodes device devices "
    "cuda num_processes n_gpus n_gpu nproc world_size num_machines",
    "the tokenizer is the model's own, read from --model": "tokenizer tokenizer_name tokenizer_path "
    "tokenizer_name_or_path use_fast_tokenizer",
    "ranks share a model by --tp and --zero": "distributed ddp fsdp2 device_map parallelism",
    "a run goes to its end; --load_best_model_at_end true exports the best checkpoint": "early_stopping patience "
    "early_stopping_patience",
    "a run never overwrites another one; name a new --output_dir": "overwrite overwrite_output_dir force",
    "what a run logs is in its --output_dir, metrics.jsonl and the files of --report_to tensorboard": "log_dir "
    "logdir logging_dir tensorboard_dir",
    "nothing is uploaded; the model is in --output_dir": "push hub_id upload push_to_hub_model_id",
    "labels of -100 in a row are ignored, and --data has nothing else to be left out": "ignore_index ignore_label",
}
NOT_TAKEN = {*REFUSED, *NEVER_USED, *NOT_WITH_DEEPSPEED, *NOT_RESUMABLE}  # flags that no run is made of
ALIKE, ALIKE_ELSEWHERE = 0.7, 0.85  # a mistyped flag; of other tools' words, short ones are alike by accident
LACKING = {word: sentence for sentence, words in NOT_OFFERED.items() for word in words.split()}


def unknown_key(name: str, known: Collection[str]) -> str:
    """Return the sentence about a name that is no flag and no key of a recipe."""
    like = name.lower().replace("-", "_")
    candidates = {*known, *LIKE, *LACKING}
    near = like if like in candidates else _near(like, set(known) - NOT_TAKEN, ALIKE)
    near = near or _near(like, candidates, ALIKE_ELSEWHERE)
    if near is None:
        return f"unknown key {name!r}; see --help"
    if near in LACKING:
        return f"unknown key {name!r}; {LACKING[near]}"
    flag = near if near in known else LIKE[near]
    more = f" ({MORE[near]})" if near in MORE else ""
    return f"unknown key {name!r}; did you mean {flag!r}?{more}"


def _near(word: str, candidates: Collection[str], least: float) -> str | None:
    return next(iter(difflib.get_close_matches(word, candidates, n=1, cutoff=least)), None)

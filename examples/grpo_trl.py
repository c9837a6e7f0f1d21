"""The reference loop's reinforcement on TRL's GRPOTrainer, moving only the weights of a mask.

Model and tasks are those of `offprin train`; sampling, advantages and loss are TRL's; the step is MaskedAdamW's.

    offprin train pretrain --out runs/base
    python examples/grpo_trl.py --base runs/base/final --out runs/grpo --steps 80 --masks safe
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from offprin_kernels import BitMask, weight_masks
from offprin_kernels.integrations.transformers import UpdateLogger, masked_optimizer
from offprin_kernels.masks import KINDS
from offprin_kernels.training import tasks

PROMPTS, SAMPLES = 8, 8  # per step; completions per prompt


def masks_of(model: torch.nn.Module, given: str) -> dict[str, BitMask]:
    """Masks from a file of `offprin mask`, or of a kind, with half of each linear layer (arXiv 2511.08567, table 4)."""
    if given in KINDS:
        return weight_masks(dict(model.named_parameters()), given, 0.5, k=16)
    return BitMask.load(given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="checkpoint of `offprin train`, such as RUN/final")
    parser.add_argument("--out", type=Path, required=True, help="directory for the tuned checkpoint and the log")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps (default: 80)")
    parser.add_argument("--masks", default="", help=f"a file, or {', '.join(KINDS)} (default: all weights move)")
    parser.add_argument("--tasks", default="add,sort,reverse", help="such as add:2-4,sort:5 (default: all)")
    arguments = parser.parse_args()

    # bf16 weights, whose low bits MaskedAdamW keeps: nothing of a small step is lost, and what bf16 shows is counted
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.bfloat16)
    masks = masks_of(model, arguments.masks) if arguments.masks else None
    if masks:
        for name, param in model.named_parameters():
            param.requires_grad_(name in masks)

    drawn = tasks.problems(PROMPTS * arguments.steps, "grpo", tasks.parse_mixture(arguments.tasks))
    problems = {problem.prompt: problem for problem in drawn}

    def reward(prompts: list[str], completions: list[str], **_) -> list[float]:
        return [tasks.reward(problems[p], text) for p, text in zip(prompts, completions, strict=True)]

    settings = GRPOConfig(
        output_dir=str(arguments.out), max_steps=arguments.steps, per_device_train_batch_size=PROMPTS * SAMPLES,
        num_generations=SAMPLES, max_completion_length=88, loss_type="dapo", epsilon=0.2, epsilon_high=0.28, beta=0.0,
        learning_rate=1e-4, weight_decay=0.0, lr_scheduler_type="constant", bf16=False, gradient_checkpointing=False,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    optimizer = masked_optimizer(model, settings, masks, rounding="master", track_visible=True)
    trainer = GRPOTrainer(
        model, reward, settings, train_dataset=Dataset.from_dict({"prompt": list(problems)}),
        processing_class=AutoTokenizer.from_pretrained(arguments.base), optimizers=(optimizer, None),
    )  # fmt: skip
    UpdateLogger().install(trainer)
    trainer.train()
    trainer.save_model(str(arguments.out / "final"))
    rows = [row for row in trainer.state.log_history if "reward" in row]
    (arguments.out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    moved = f"{rows[-1]['visible_fraction']:.2%} of all weights in their layers did so visibly in the last step"
    print(f"{rows[-1]['masked_weights']:,} weights could move, {moved}; {arguments.out / 'final'}")


if __name__ == "__main__":
    main()

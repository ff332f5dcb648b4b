"""Fine-tune a model with QLoRA on a folder of text files, save the adapter, merge it and save the merged model.

    pip install 'halfbyte[transformers]' peft trl
    python examples/qlora.py MODEL DATA OUTPUT [--steps 200] [--merge-into 4bit]

MODEL is a folder (or a name on the hub) with 16-bit, 32-bit or 4-bit weights and a tokenizer; weights that are not
4-bit yet are quantized to NF4 while they load. DATA is a folder: every `*.txt` file in it and below is one document.
OUTPUT receives `adapter/`, the trained LoRA weights, and `merged/`, a complete model without PEFT. Runs on a GPU if
there is one, otherwise on the CPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import halfbyte
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub name of a causal language model")
    parser.add_argument("data", type=Path, help="folder of .txt files")
    parser.add_argument("output", type=Path, help="folder for the results")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences per step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="peak rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of initialization and data order (default: %(default)s)")
    parser.add_argument(
        "--merge-into",
        choices=("16bit", "4bit"),
        default="16bit",
        help="16bit: merge into dequantized weights, which needs memory for the dense model; 4bit: quantize the merged "
        "weights again, which rounds small changes away, most of a short training (default: %(default)s)",
    )
    return parser.parse_args()


def read_documents(folder: Path) -> Dataset:
    """Every text file below `folder`, in the order of their paths."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.txt"))]
    texts = [text for text in texts if text.strip()]
    if not texts:
        sys.exit(f"error: data must be a folder with .txt files that hold text, got {folder}")
    return Dataset.from_dict({"text": texts})


def load(model: str) -> torch.nn.Module:
    """The model in 4 bits. Without a compute dtype, products run in the dtype of their input."""
    config = halfbyte.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    where = {"": 0} if torch.cuda.is_available() else {"": "cpu"}
    return AutoModelForCausalLM.from_pretrained(model, quantization_config=config, device_map=where)


def main() -> None:
    """Train, save the adapter, merge, save the result."""
    args = arguments()
    documents = read_documents(args.data)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    # Freezes the base model, brings norms to float32, and lets gradient checkpointing work with a frozen embedding.
    model = prepare_model_for_kbit_training(load(args.model), use_gradient_checkpointing=True)
    adapter = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(args.output / "trainer"),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            max_length=args.length,
            # All documents in one stream, cut into sequences of `max_length`: no padding, nothing is left out.
            packing=True,
            packing_strategy="wrapped",
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, args.steps // 20),
            logging_steps=1,
            gradient_checkpointing=True,
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
            seed=args.seed,
        ),
        train_dataset=documents,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last")

    trainer.save_model(str(args.output / "adapter"))
    print(f"saved the adapter: {args.output / 'adapter'}")

    if args.merge_into == "4bit":
        merged = trainer.model.merge_and_unload()
    else:
        del trainer, model
        dense = load(args.model).dequantize()
        merged = PeftModel.from_pretrained(dense, str(args.output / "adapter")).merge_and_unload()
    merged.save_pretrained(args.output / "merged")
    tokenizer.save_pretrained(args.output / "merged")
    print(f"saved the merged model, {args.merge_into}: {args.output / 'merged'}")


if __name__ == "__main__":
    main()

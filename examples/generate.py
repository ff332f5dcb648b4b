"""Generate text with a 4-bit model: a static key/value cache and, with `--compile`, compiled decoding.

    pip install 'halfbyte[transformers]'
    python examples/generate.py MODEL "Once upon a time" [--compile] [--tokens 64]

MODEL is a folder (or a name on the hub) with 16-bit, 32-bit or 4-bit weights and a tokenizer; weights that are not
4-bit yet are quantized to NF4 while they load. Runs on a GPU if there is one, otherwise on the CPU.
"""

from __future__ import annotations

import argparse
import time

import halfbyte
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub name of a causal language model")
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens, at most (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile the decoding step: slow once, then faster")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--seed", type=int, default=0, help="for a temperature above 0 (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Load, generate, print the text and the speed."""
    args = arguments()
    torch.manual_seed(args.seed)
    cuda = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(
        args.model,
        # Without a compute dtype, products run in the dtype of their input: the model's.
        quantization_config=halfbyte.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
        device_map={"": 0} if cuda else {"": "cpu"},
    ).eval()
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    how = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    # A static cache keeps its address and shape while text is made, so that one compiled graph serves every step.
    how |= {"max_new_tokens": args.tokens, "cache_implementation": "static", "disable_compile": not args.compile}
    if args.compile:
        how["compile_config"] = CompileConfig(fullgraph=True, mode="reduce-overhead" if cuda else "default")
        # transformers would compile for a GPU only.
        how["compile_config"]._compile_all_devices = True
    if tokenizer.pad_token_id is None:
        how["pad_token_id"] = tokenizer.eos_token_id
    with torch.inference_mode():
        # The first call compiles kernels, and with --compile the decoding step. It is not timed.
        model.generate(**inputs, **how)
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        output = model.generate(**inputs, **how)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    count = output.shape[1] - inputs["input_ids"].shape[1]
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    print(f"{count} tokens in {seconds:.2f} s: {count / seconds:.1f} tokens/s, prompt included")


if __name__ == "__main__":
    main()

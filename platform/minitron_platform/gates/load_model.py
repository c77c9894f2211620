"""Load a checkpoint with transformers alone and print what it is as JSON; run by `clean_process` as a program of its own.

Arguments: the folder, the number of tokens of the timed prompt, how often it is timed.
"""

import json
import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Print the model's size and time, or exit with what is wrong with it."""
    folder, tokens, repeats = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    safe = {"trust_remote_code": False, "local_files_only": True}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, use_safetensors=True, dtype="auto", output_loading_info=True, **safe
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        missing, unexpected = (sorted(info[kind])[:3] for kind in ("missing_keys", "unexpected_keys"))
        sys.exit(f"tensors that are missing: {missing}, tensors that the model does not have: {unexpected}")
    model.eval().to(device)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocabulary:
        sys.exit(f"the tokenizer has {len(tokenizer)} tokens, the embeddings have {vocabulary}")
    ids = torch.arange(tokens, device=device)[None] % len(tokenizer)
    seconds = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            begun = time.perf_counter()
            finite = bool(model(input_ids=ids).logits[:, -1].float().isfinite().all())
            seconds.append(time.perf_counter() - begun)
    if not finite:
        sys.exit("the logits of a prompt are not finite")
    print(
        json.dumps(
            {
                "parameters": model.num_parameters(),
                "bytes": model.get_memory_footprint(),
                "milliseconds": 1000 * statistics.median(seconds[1:]) if repeats else None,
                "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
            }
        )
    )


if __name__ == "__main__":
    main()

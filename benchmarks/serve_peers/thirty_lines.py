"""The thirty lines everybody writes first, behind plain FastAPI: stock `generate`, one request at a time.

The argument is a JSON file: `base`, `experts` (name to PEFT folder), `dtype`, `port`, and `merge`: whether each expert
is merged into a model of its own, the fastest these lines can be, or all are adapters of one model that is switched.
"""

import json
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

job = json.loads(Path(sys.argv[1]).read_text())
tokenizer: Any = AutoTokenizer.from_pretrained(job["base"])
models: dict[str, Any] = {}
for name, folder in job["experts"].items():
    if models and not job["merge"]:
        next(iter(models.values())).load_adapter(folder, adapter_name=name)
        continue
    base: Any = AutoModelForCausalLM.from_pretrained(job["base"], dtype=getattr(torch, job["dtype"]))
    model = PeftModel.from_pretrained(base, folder, adapter_name=name)
    models[name] = (model.merge_and_unload() if job["merge"] else model).eval()

app = FastAPI()
lock = threading.Lock()


@app.post("/v1/chat/completions")
def answer(body: dict[str, Any]) -> dict[str, Any]:
    """Answer one request; the others wait."""
    inputs = tokenizer.apply_chat_template(
        body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with lock, torch.inference_mode():
        answering = models.get(body["model"]) or next(iter(models.values()))
        if not job["merge"]:
            answering.set_adapter(body["model"])
        output = answering.generate(**inputs, max_new_tokens=body["max_tokens"], do_sample=False)
    tokens = output[0, inputs["input_ids"].shape[1] :]
    return {
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": tokenizer.decode(tokens, skip_special_tokens=True)},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": inputs["input_ids"].shape[1], "completion_tokens": len(tokens)},
    }


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=job["port"], log_level="warning")

"""What a user would write. mypy checks it strictly, and `test_user_code` runs it."""

import asyncio
from typing import Any

from pipeline import Expert, ExpertManager, InferenceResult, demo
from pipeline.errors import ExpertError, InvalidRequestError

SCHEMA = "CREATE TABLE users (id INT, name TEXT, city TEXT, age INT);"
PROMPT = "How many users are there per city?"


def thirty_lines(prompt: str, schema: str) -> str:
    """The manual way: open the package, load base, adapter and tokenizer, template, generate, decode, cut."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pipeline.package import open_package

    package = open_package(demo.package("sql"))
    base: Any = AutoModelForCausalLM.from_pretrained(demo.BASE_MODEL, dtype=torch.float32)
    model: Any = peft.PeftModel.from_pretrained(base, str(package.root))
    model.eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(package.root)
    messages = [
        {"role": "system", "content": f"Dialect: postgres\nSchema:\n{schema}"},
        {"role": "user", "content": prompt},
    ]
    inputs = tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=True,
        enable_thinking=False,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=package.manifest.decoding.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for stop in package.manifest.decoding.stop_sequences:
        text = text.partition(stop)[0]
    return text


def three_lines(prompt: str, schema: str) -> str:
    """The same with this library."""
    with Expert.load(demo.package("sql"), base_model=demo.BASE_MODEL, device="cpu", dtype="float32") as expert:
        return expert.generate(prompt, schema=schema).text


def with_results(expert: Expert) -> dict[str, object]:
    """Results and their errors."""
    results: list[InferenceResult] = expert.generate_batch([PROMPT, {"prompt": "", "seed": 3}], schema=SCHEMA)
    codes = [result.error.code if result.error else None for result in results]
    first = results[0]
    return {"codes": codes, "tokens": first.completion_tokens, "seconds": first.timings.total}


def with_a_stream(expert: Expert) -> tuple[str, InferenceResult]:
    """Text as it comes."""
    stream = expert.generate_stream(PROMPT, schema=SCHEMA, max_tokens=40, stop=[";"])
    text = "".join(stream)
    return text, stream.result


async def with_tasks(expert: Expert) -> list[str]:
    """Many at once."""
    results = await asyncio.gather(*(expert.agenerate(PROMPT, schema=SCHEMA, seed=seed) for seed in range(3)))
    pieces = [piece async for piece in expert.agenerate_stream(PROMPT, schema=SCHEMA)]
    return [*(result.text for result in results), "".join(pieces)]


def with_errors(expert: Expert) -> str:
    """What is wrong, and what to do."""
    try:
        expert.generate(PROMPT, temperature=-1)
    except InvalidRequestError as error:
        return f"{error.code}: {error.message} {error.hint}"
    except ExpertError:
        raise
    return ""


def with_several_experts() -> list[str]:
    """Many experts over one base model."""
    with ExpertManager(base_model=demo.BASE_MODEL, device="cpu", max_loaded_experts=8) as manager:
        manager.load_experts({"sql": demo.package("sql"), "json": demo.package("json")})
        mixed = manager.generate_batch(
            [("sql", {"prompt": PROMPT, "schema": SCHEMA}), ("json", {"prompt": "Omar turned 45."})]
        )
        names = [f"{info.name} {info.kind} {info.rank}" for info in manager.list_loaded_experts()]
        return [*names, *(result.expert_name for result in mixed)]

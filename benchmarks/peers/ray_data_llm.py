"""Ray Data LLM with vLLM, in an interpreter that has both: `python ray_data_llm.py JOB_AS_JSON`.

The job says `model` (a directory), `dataset` (Parquet with `tokens` and `expected`), how many `rows` it has, `output`
and `cores`. The last line printed is JSON: `began` and `ended`, in seconds since 1970.
"""

import json
import os
import shutil
import sys
import time
from typing import Any

import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

MAX_TOKENS = 64
BATCH_ROWS = 64  # the processor's own default
CACHE_GIB = 2


def main(job: dict[str, Any]) -> dict[str, float]:
    """Read, answer and write; when the first rows were begun, and what it took."""
    ray.init(
        address="local",
        num_cpus=job["cores"],
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the cores are not a NUMA node's own
        "OMP_NUM_THREADS": str(job["cores"]),
        "PYTHONPATH": "",
    }
    config = vLLMEngineProcessorConfig(
        model_source=job["model"],
        engine_kwargs={"dtype": "float32", "max_model_len": 512, "enable_prefix_caching": True},
        placement_group_config={"bundle_per_worker": {"CPU": 1}},
        concurrency=1,
        log_engine_metrics=False,
        batch_size=BATCH_ROWS,
        chat_template_stage=False,  # it is given the tokens that our own builder makes
        tokenize_stage=False,
        detokenize_stage=False,
        prepare_multimodal_stage=False,
        runtime_env={"env_vars": environment},
    )
    processor = build_processor(config, preprocess=_asked, postprocess=_answered)
    shutil.rmtree(job["output"], ignore_errors=True)
    blocks = max(1, job["rows"] // BATCH_ROWS)
    processor(ray.data.read_parquet(job["dataset"], override_num_blocks=blocks)).write_parquet(job["output"])
    ended = time.time()
    rows = ray.data.read_parquet(job["output"]).to_pandas()
    return {"began": float((rows["answered_at"] - rows["seconds"]).min()), "ended": ended}


def _asked(row: dict[str, Any]) -> dict[str, Any]:
    sampling = {"temperature": 0.0, "max_tokens": MAX_TOKENS}
    return {"tokenized_prompt": row["tokens"], "expected": row["expected"], "sampling_params": sampling}


def _answered(row: dict[str, Any]) -> dict[str, Any]:
    seconds = {"seconds": row["time_taken_llm"], "answered_at": time.time()}
    return {"text": row["generated_text"], "expected": row["expected"], **seconds}


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    print(json.dumps(main(json.loads(sys.argv[1]))))  # noqa: T201 - the result

"""The padded engine against PEFT and against itself: one row, many rows, any order, any batch size."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.engine import LoadedExpert, Request, SamplingParams, load_expert
from pipeline.engine.sampling import answer_seed
from pipeline.errors import AdapterError, BaseModelError, ConfigError, InferenceError, InvalidRequestError
from pipeline.package import open_package
from tests import tiny
from tests.engine.test_packed import NO_MEMORY

QUESTIONS = [
    "List the name of all users.",
    "Which orders have price over 100?",
    "a",
    "Show the 3 ships with the highest speed, and then say something that is quite a lot longer than the others.",
    "Count the cars for each color.",
    "Ünïcødé — 日本語 and emoji 🎉",
    "How many?",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base(tmp_path_factory.mktemp("base"), vocab_size=len(tiny.tokenizer()))


@pytest.fixture(scope="module")
def expert(base: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedExpert:
    path, _ = tiny.make_package("dora", base, tmp_path_factory.mktemp("packages"))
    return load_expert(open_package(path), base, engine="padded", device="cpu", dtype="float32")


def requests(expert: LoadedExpert, **options: object) -> list[Request]:
    return [
        expert.requests.build(str(number), prompt=question, options={"seed": number, **options})
        for number, question in enumerate(QUESTIONS)
    ]


def texts(expert: LoadedExpert, asked: list[Request]) -> dict[str, str]:
    return {completion.request_id: completion.text for completion in expert.engine.generate(asked)}


@pytest.mark.parametrize("kind", tiny.ADAPTERS)
def test_greedy_tokens_equal_unmerged_peft(kind: str, base: Path, tmp_path: Path) -> None:
    path, adapted = tiny.make_package(kind, base, tmp_path)
    expert = load_expert(open_package(path), base, engine="padded", device="cpu", dtype="float32")
    plain = tiny.Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    answers = {completion.request_id: completion for completion in expert.engine.generate(requests(expert))}
    differs_from_base = 0
    for request in requests(expert):
        prompt = torch.tensor([request.prompt_token_ids])
        wanted = generated(adapted, prompt)
        assert answers[request.id].completion_tokens == len(wanted)
        assert answers[request.id].text == tiny.tokenizer().decode(wanted, skip_special_tokens=True)
        differs_from_base += wanted != generated(plain, prompt)
    assert differs_from_base > 0, "the adapter must change some answer"


def generated(model: torch.nn.Module, prompt: torch.Tensor) -> list[int]:
    with torch.inference_mode():
        output = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False
        )
    return output[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_an_answer_does_not_depend_on_its_neighbours(
    expert: LoadedExpert, base: Path, temperature: float, batch_size: int
) -> None:
    asked = requests(expert, temperature=temperature, max_tokens=16)
    alone = {}
    for request in asked:
        alone |= texts(expert, [request])
    expert.engine._batch_size = batch_size  # type: ignore[attr-defined]
    try:
        assert texts(expert, asked) == alone
        assert texts(expert, asked[::-1]) == alone
    finally:
        expert.engine._batch_size = 64  # type: ignore[attr-defined]
    assert len(set(alone.values())) > 1, "different prompts must get different answers for this to say anything"


@pytest.mark.parametrize(("kind", "says"), NO_MEMORY, ids=["GPU", "CPU", "Python"])
def test_a_batch_that_does_not_fit_the_memory_is_halved(
    expert: LoadedExpert, kind: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = requests(expert, max_tokens=8)
    wanted = texts(expert, asked)
    model = expert.engine._model.model  # type: ignore[union-attr]
    plain, sizes = model.generate, []

    def on_a_small_device(*, input_ids: torch.Tensor, **more: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise kind(says)
        return plain(input_ids=input_ids, **more)

    monkeypatch.setattr(model, "generate", on_a_small_device)
    assert texts(expert, asked) == wanted
    assert sizes == [7, 3, 1, 2, 4, 2, 2]


def test_sampled_answers_follow_the_seed_alone(expert: LoadedExpert) -> None:
    request = expert.requests.build("a", prompt=QUESTIONS[0], options={"temperature": 1.5, "seed": 1})
    same = replace(request, id="b")
    other = replace(request, id="c", params=replace(request.params, seed=2))
    answers = texts(expert, [request, same, other])
    assert answers["a"] == answers["b"]
    assert answers["a"] != answers["c"]


def test_rows_of_one_batch_follow_their_own_options(expert: LoadedExpert) -> None:
    short = expert.requests.build("short", prompt=QUESTIONS[0], options={"max_tokens": 2})
    long = expert.requests.build("long", prompt=QUESTIONS[0], options={"max_tokens": 9})
    answers = {completion.request_id: completion for completion in expert.engine.generate([short, long])}
    assert answers["short"].completion_tokens == 2
    assert answers["short"].finish_reason == "length"
    assert answers["long"].text.startswith(answers["short"].text)
    assert answers["long"].completion_tokens > 2


def test_a_stop_string_ends_a_row_and_is_cut(expert: LoadedExpert) -> None:
    request = expert.requests.build("a", prompt=QUESTIONS[0], options={"max_tokens": 12})
    whole = texts(expert, [request])["a"]
    middle = len(whole) // 2
    stop = whole[middle : middle + 2]
    stopped = replace(request, params=replace(request.params, stop=(stop,)))
    completion = next(iter(expert.engine.generate([stopped])))
    assert completion.text == whole[: whole.index(stop)]
    assert completion.finish_reason == "stop"
    assert stop not in completion.text


def test_a_batch_keeps_within_its_limits(expert: LoadedExpert) -> None:
    asked = [
        sequence
        for request in requests(expert, max_tokens=16)
        for sequence in expert.engine._start(request)  # type: ignore[attr-defined]
    ]
    asked.sort(key=lambda sequence: len(sequence.request.prompt_token_ids))
    expert.engine._max_batch_tokens = 120  # type: ignore[attr-defined]
    try:
        batches = list(expert.engine._batches(asked))  # type: ignore[attr-defined]
    finally:
        expert.engine._max_batch_tokens = 16384  # type: ignore[attr-defined]
    assert [sequence for batch in batches for sequence in batch] == asked
    for batch in batches:
        longest = max(len(sequence.request.prompt_token_ids) for sequence in batch)
        assert len(batch) == 1 or (longest + 16) * len(batch) <= 120
    assert len(batches) > 1


def test_a_closed_engine_says_so(base: Path, tmp_path: Path) -> None:
    path, _ = tiny.make_package("lora", base, tmp_path)
    expert = load_expert(open_package(path), base, device="cpu")
    asked = requests(expert)
    expert.engine.close()
    with pytest.raises(InferenceError, match="closed"):
        list(expert.engine.generate(asked))


def test_no_requests_no_completions(expert: LoadedExpert) -> None:
    assert list(expert.engine.generate([])) == []


def test_an_adapter_for_another_shape_is_refused(base: Path, tmp_path: Path) -> None:
    path, _ = tiny.make_package("lora", base, tmp_path)
    with pytest.raises(AdapterError, match="does not fit") as caught:
        load_expert(open_package(path), tiny.demo.BASE_MODEL)
    assert any("shape" in detail or "missing" in detail for detail in caught.value.details)


def test_a_folder_without_a_model_is_refused(base: Path, tmp_path: Path) -> None:
    path, _ = tiny.make_package("lora", base, tmp_path / "package")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load_expert(open_package(path), tmp_path / "model")


@pytest.mark.parametrize(("device", "dtype"), [("tpu9", None), ("cuda:7", None), ("cpu", "int3")])
def test_an_unknown_device_or_dtype_is_refused(
    base: Path, tmp_path: Path, device: str | None, dtype: str | None
) -> None:
    path, _ = tiny.make_package("lora", base, tmp_path)
    with pytest.raises(ConfigError):
        load_expert(open_package(path), base, device=device, dtype=dtype)


def test_every_completion_counts_its_tokens(expert: LoadedExpert) -> None:
    for completion, request in zip(
        sorted(expert.engine.generate(requests(expert)), key=lambda item: item.request_id),
        requests(expert),
        strict=True,
    ):
        assert completion.prompt_tokens == len(request.prompt_token_ids)
        assert 1 <= completion.completion_tokens <= request.params.max_tokens
        assert completion.failure is None


def test_sampling_params_of_the_manifest_are_the_defaults(base: Path, tmp_path: Path) -> None:
    path, _ = tiny.make_package("lora", base, tmp_path, temperature=0.7, top_p=0.8, top_k=20, stop_sequences=[";"])
    expert = load_expert(open_package(path), base, device="cpu")
    request = expert.requests.build("a", prompt="b", options={"top_k": 5})
    assert request.params == SamplingParams(temperature=0.7, top_p=0.8, top_k=5, stop=(";",), max_tokens=12)


def test_a_request_for_several_answers_gets_them(expert: LoadedExpert) -> None:
    request = expert.requests.build("a", prompt=QUESTIONS[0], options={"temperature": 1.5, "seed": 3, "n": 4})
    answers = sorted(expert.engine.generate([request]), key=lambda answer: answer.index)
    assert [answer.index for answer in answers] == [0, 1, 2, 3]
    assert len({answer.text for answer in answers}) > 1
    for answer in answers:
        params = replace(request.params, n=1, seed=answer_seed(3, answer.index))
        (alone,) = expert.engine.generate([replace(request, params=params)])
        assert replace(alone, index=answer.index) == answer


def test_log_probabilities_are_those_of_the_model(expert: LoadedExpert) -> None:
    asked = requests(expert, max_tokens=6, logprobs=3, repetition_penalty=1.5, temperature=0.8)
    model = expert.engine._model.model  # type: ignore[attr-defined]
    for request, answer in zip(asked, sorted(expert.engine.generate(asked), key=lambda a: a.request_id), strict=True):
        assert answer.logprobs is not None
        assert [entry.token_id for entry in answer.logprobs] == list(answer.token_ids)
        whole = torch.tensor([[*request.prompt_token_ids, *answer.token_ids]])
        with torch.inference_mode():
            logprobs = model(whole).logits[0].log_softmax(dim=-1)[len(request.prompt_token_ids) - 1 : -1]
        for entry, row in zip(answer.logprobs, logprobs, strict=True):
            assert abs(entry.logprob - row[entry.token_id].item()) < 1e-4
            assert [token_id for token_id, _ in entry.top] == row.topk(3).indices.tolist()


def test_what_the_padded_engine_cannot_do_fails_its_row_alone(expert: LoadedExpert) -> None:
    good = expert.requests.build("good", prompt=QUESTIONS[0])
    soft = replace(good, id="soft", prompt_token_ids=(10**6, *good.prompt_token_ids))
    other = replace(good, id="other", expert="sql@1")
    answers = {answer.request_id: answer for answer in expert.engine.generate([soft, good, other])}
    assert answers["good"].failure is None
    for name, says in (("soft", "soft-prompt"), ("other", "sql@1")):
        failure = answers[name].failure
        assert failure is not None
        assert failure.code == InvalidRequestError.code
        assert says in failure.message

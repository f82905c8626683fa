"""An expert in a service of your own: uvicorn examples.fastapi_service:app

Requests that come together are answered in one running batch. `expert serve` is a whole service: keys, limits, streams.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel

from pipeline import Expert, demo, errors


class Question(BaseModel):
    question: str
    tables: str


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    with Expert.load(demo.package("sql"), base_model=demo.BASE_MODEL) as expert:
        app.state.expert = expert
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/sql")
async def sql(question: Question, request: Request) -> dict[str, str]:
    try:
        answer = await request.app.state.expert.agenerate(question.question, schema=question.tables)
    except (errors.InvalidRequestError, errors.PromptTooLongError) as error:
        raise HTTPException(400, error.message) from error
    return {"sql": answer.text}

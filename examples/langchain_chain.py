"""A LangChain chain over an expert: python examples/langchain_chain.py"""

import sys

from pipeline import Expert, demo

try:
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import ChatPromptTemplate

    from pipeline.integrations.langchain import ChatExpert
except ImportError:
    print('LangChain is not installed. Fix: pip install "expert-pipeline[langchain]"', file=sys.stderr)
    sys.exit(2)

SCHEMA = "CREATE TABLE users (id INT, name TEXT, city TEXT, age INT);"


def main() -> None:
    with Expert.load(demo.package("sql"), base_model=demo.BASE_MODEL) as expert:
        model = ChatExpert(expert=expert, options={"schema": SCHEMA})
        prompt = ChatPromptTemplate.from_messages([("user", "How many users are there per {column}?")])
        chain = prompt | model | StrOutputParser()
        for answer in chain.batch([{"column": "city"}, {"column": "age"}]):  # one batch of the engine
            print(answer)


if __name__ == "__main__":
    main()

"""A client of `expert serve`: python examples/rest_client.py http://127.0.0.1:8000 "How many users are there?" """

import json
import os
import sys
import urllib.error
import urllib.request

SCHEMA = "CREATE TABLE users (id INT, name TEXT, city TEXT, age INT);"


def ask(url: str, question: str) -> str:
    body = {"model": "expert-sql", "schema": SCHEMA, "messages": [{"role": "user", "content": question}]}
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("EXPERT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        print(ask(*sys.argv[1:]))
    except urllib.error.HTTPError as error:  # its body says what is wrong
        sys.exit(json.load(error)["error"]["message"])
    except urllib.error.URLError as error:
        sys.exit(f"nothing answers at {sys.argv[1]}: {error.reason}; start it with expert serve")

// The request that the page would send, as others would send it.

const OPENAI_FIELDS = ["model", "messages", "temperature", "max_tokens", "seed", "stream", "stream_options"];
const KEY_NAME = "EXPERT_API_KEY";

/** A shell command. The key itself never stands in it. */
export function asCurl(body, { base, hasKey }) {
  const lines = [`curl -N ${shellQuoted(`${base}/chat/completions`)}`, `-H 'Content-Type: application/json'`];
  if (hasKey) lines.push(`-H "Authorization: Bearer $${KEY_NAME}"`);
  lines.push(`-d ${shellQuoted(JSON.stringify(body, null, 2))}`);
  return lines.join(" \\\n  ");
}

/** A program for the `openai` package. The key itself never stands in it. */
export function asPython(body, { base, hasKey }) {
  const known = Object.entries(body).filter(([name]) => OPENAI_FIELDS.includes(name));
  const extra = Object.entries(body).filter(([name]) => !OPENAI_FIELDS.includes(name));
  const key = hasKey ? `os.environ["${KEY_NAME}"]` : `"unused"`;
  const args = known.map(([name, value]) => `    ${name}=${pythonLiteral(value)},`);
  if (extra.length) {
    const items = extra.map(([name, value]) => `        ${pythonLiteral(name)}: ${pythonLiteral(value)},`);
    args.push("    extra_body={", ...items, "    },");
  }
  return [
    ...(hasKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${pythonLiteral(base)}, api_key=${key})`,
    "stream = client.chat.completions.create(",
    ...args,
    ")",
    "for chunk in stream:",
    "    if chunk.choices:",
    `        print(chunk.choices[0].delta.content or "", end="", flush=True)`,
  ].join("\n");
}

function shellQuoted(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

/** JSON's strings and numbers are Python's too; its three words are not. */
function pythonLiteral(value) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(pythonLiteral).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([name, item]) => `${pythonLiteral(name)}: ${pythonLiteral(item)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}

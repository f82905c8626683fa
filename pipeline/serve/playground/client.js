// Speaks to the API: the list of experts, and a streamed answer.

/** An error of the API, whose message says what to do next, or of the way to it, which has a hint of its own. */
export class ApiError extends Error {
  constructor(code, message, { hint = "", status = 0, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { code, hint, status, retryAfter });
  }

  /** From the body of a refusal, or of an error event within a stream. */
  static fromBody(body, status = 0, retryAfter = null) {
    const error = body?.error ?? {};
    const code = error.code ?? error.type ?? (status ? `http_${status}` : "error");
    return new ApiError(String(code), String(error.message ?? "The server gave no reason."), {
      status,
      retryAfter,
    });
  }
}

/** The experts as `GET /v1/models` lists them. */
export async function listModels(key) {
  const response = await call("v1/models", { key });
  return (await response.json()).data;
}

/**
 * Ask, and yield the chunks of the answer as they come.
 *
 * Ends normally only after the server has said that the stream is whole; anything else throws.
 */
export async function* streamChat(body, { key, signal, onResponse }) {
  const response = await call("v1/chat/completions", { key, signal, body });
  onResponse(response);
  for await (const data of serverSentEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = parse(data);
    if (chunk.error) throw ApiError.fromBody(chunk);
    yield chunk;
  }
  throw new ApiError("connection_lost", "The connection ended before the answer did.", { hint: "Send it again." });
}

/** Headers with the key, if there is one. */
function headers(key) {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function call(path, { key, signal, body }) {
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), {
      method: body ? "POST" : "GET",
      headers: headers(key),
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const hint = headersAreLatin(key) ? "Is it running, and is the network up?" : "The API key holds characters that no key has.";
    throw new ApiError("unreachable", "The server cannot be reached.", { hint });
  }
  if (response.ok) return response;
  const refusal = await response.json().catch(() => ({}));
  throw ApiError.fromBody(refusal, response.status, response.headers.get("Retry-After"));
}

function headersAreLatin(key) {
  return /^[\x20-\x7e]*$/.test(key ?? "");
}

function parse(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ApiError("unreadable_event", "The server sent an event that is not JSON.", { hint: "Send it again." });
  }
}

/** The data of each server-sent event; comments and other fields are passed over. */
export async function* serverSentEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      let read;
      try {
        read = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        return; // cut off: the caller sees that the last event is missing
      }
      if (read.done) return;
      // A line may end with CR LF, and a chunk may end between the two: a lone CR waits for what follows.
      const lines = (rest + read.value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) {
          data.push(line.slice(line.startsWith("data: ") ? 6 : 5));
        } else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // already closed, or aborted: there is nothing left to cancel
  }
}

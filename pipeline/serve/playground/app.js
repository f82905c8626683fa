// The page: a form, the answer as it comes, and the same request as code. Model text only ever becomes text.

import { ApiError, listModels, streamChat } from "./client.js";
import { asCurl, asPython } from "./snippets.js";

const KEY_ITEM = "expert-api-key";
const DONE = { stop: "complete", length: "cut at max tokens", cancelled: "cancelled", error: "failed" };

const $ = (id) => document.getElementById(id);
const models = new Map();
let examples = {};
let key = sessionStorage.getItem(KEY_ITEM) ?? "";
let isLocked = false; // whether the server asks for another key, or for one at all
let running = null; // the AbortController of the request under way

// --- experts ---------------------------------------------------------------------------------------------------------

async function loadModels() {
  $("server").textContent = "";
  try {
    const cards = await listModels(key);
    models.clear();
    for (const card of cards) models.set(card.id, card);
    const before = $("model").value;
    $("model").replaceChildren(...cards.map((card) => new Option(card.id, card.id)));
    if (models.has(before)) $("model").value = before;
    $("model").disabled = cards.length === 0;
    $("server").textContent = cards.length === 1 ? "1 expert" : `${cards.length} experts`;
    $("server").dataset.state = "up";
    isLocked = false;
    showError(null);
  } catch (error) {
    models.clear();
    $("model").replaceChildren(new Option("No experts yet", ""));
    $("model").disabled = true;
    $("server").textContent = error.status === 401 ? "locked" : error.status ? "failing" : "not reachable";
    $("server").dataset.state = "down";
    showError(error);
  }
  showExpert();
}

function showExpert() {
  const card = models.get($("model").value) ?? {};
  $("description").textContent = card.description ?? "";
  $("description").hidden = !card.description;
  const facts = [["Base", card.base], ["Version", card.version], ["Kind", card.kind], ["Digest", card.digest?.slice(0, 12)]];
  $("facts").replaceChildren(...facts.filter(([, value]) => value).map(([name, value]) => fact(name, value)));
  $("facts").hidden = !card.id;
  $("schema-field").open = card.takes_schema ?? true;
  const dialects = card.dialects ?? [];
  $("dialect").replaceChildren(...dialects.map((name) => new Option(name, name)));
  $("dialect-field").hidden = dialects.length < 2;
  forgetExample();
  const own = examples[card.digest] ?? [];
  $("example-list").replaceChildren(...own.map(exampleButton));
  $("examples").hidden = own.length === 0;
  showCode();
}

/** An example says nothing to another expert; what the user wrote stays. */
function forgetExample() {
  const isShown = (example) => example.schema === $("schema").value && example.prompt === $("question").value;
  if (Object.values(examples).flat().some(isShown)) $("schema").value = $("question").value = "";
}

function fact(name, value) {
  const [group, term, text] = ["div", "dt", "dd"].map((tag) => document.createElement(tag));
  term.textContent = name;
  text.textContent = value;
  group.append(term, text);
  return group;
}

function exampleButton(example) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "chip";
  button.textContent = example.prompt;
  button.addEventListener("click", () => {
    $("schema-field").open = true;
    $("schema").value = example.schema;
    $("question").value = example.prompt;
    showCode();
    $("question").focus();
  });
  return button;
}

// --- the request -----------------------------------------------------------------------------------------------------

/** What is sent: only what was filled in, so that everything else is the expert's own default. */
function requestBody() {
  const body = { model: $("model").value, messages: [{ role: "user", content: $("question").value }] };
  if (hasSchema() && $("schema-field").open) {
    body.schema = $("schema").value;
    if ($("dialect").selectedIndex > 0) body.dialect = $("dialect").value;
  }
  for (const name of ["temperature", "max_tokens", "seed"]) {
    if ($(name).value !== "") body[name] = Number($(name).value);
  }
  const grammar = new FormData($("request")).get("grammar");
  if (grammar) body.use_grammar = grammar === "true";
  return { ...body, stream: true, stream_options: { include_usage: true } };
}

function hasSchema() {
  return $("schema").value.trim() !== "";
}

/** Only what the page itself cannot send; whether a value is in range is for the server to say. */
function firstProblem() {
  if (models.size === 0) return ["model", "There is no expert to ask."];
  if (!$("question").value.trim()) return ["question", "Write a question first."];
  for (const name of ["temperature", "max_tokens", "seed"]) {
    if ($(name).validity.badInput) return [name, `${name} is not a number.`];
    if (Math.abs(Number($(name).value)) > Number.MAX_SAFE_INTEGER) return [name, `${name} is larger than a page can send.`];
  }
  return null;
}

// --- the answer ------------------------------------------------------------------------------------------------------

async function send() {
  if (running) return;
  const problem = firstProblem();
  if (problem) {
    setStatus(problem[1]);
    $(problem[0]).focus();
    return;
  }
  const answer = beginAnswer();
  running = new AbortController();
  setRunning(true);
  setStatus("Answering …");
  if (matchMedia("(max-width: 900px)").matches) $("answer-card").scrollIntoView({ block: "start" });
  const timer = setInterval(() => answer.tick(), 100);
  const onResponse = (response) => showRequestId(response.headers.get("X-Request-Id"));
  try {
    for await (const chunk of streamChat(requestBody(), { key, signal: running.signal, onResponse })) answer.add(chunk);
    answer.end();
    setStatus("Done");
  } catch (error) {
    if (error.name === "AbortError") {
      answer.end("stopped");
      setStatus("Stopped");
    } else {
      answer.end(DONE.error);
      setStatus("");
      showError(error);
    }
  } finally {
    clearInterval(timer);
    running = null;
    setRunning(false);
  }
}

/** Clears what is shown, and returns what the chunks of the next answer are given to. */
function beginAnswer() {
  const text = document.createTextNode("");
  $("answer").replaceChildren(text);
  showEmpty("");
  showError(null);
  showRequestId(null);
  showBadge("");
  for (const id of ["first-token", "total", "speed", "prompt-tokens", "completion-tokens"]) $(id).textContent = "–";
  const began = performance.now();
  let last = began;
  let finishReason = null;
  const showTotal = () => ($("total").textContent = seconds(last - began));
  return {
    tick() {
      last = performance.now();
      showTotal();
    },
    add(chunk) {
      last = performance.now();
      const choice = chunk.choices?.[0];
      const piece = choice?.delta?.content;
      if (piece) {
        if (text.length === 0) $("first-token").textContent = seconds(last - began);
        const box = $("answer-box");
        const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 24;
        text.appendData(piece);
        if (isAtEnd) box.scrollTop = box.scrollHeight;
      }
      finishReason = choice?.finish_reason ?? finishReason;
      if (chunk.usage) {
        $("prompt-tokens").textContent = tokens(chunk.usage.prompt_tokens);
        $("completion-tokens").textContent = tokens(chunk.usage.completion_tokens);
        const speed = (chunk.usage.completion_tokens * 1000) / (last - began);
        $("speed").textContent = `${speed.toFixed(speed < 10 ? 1 : 0)} tok/s`;
      }
    },
    end(how) {
      this.tick();
      showBadge(how ?? DONE[finishReason] ?? finishReason ?? "");
      $("copy-answer").disabled = text.length === 0;
      if (text.length === 0) showEmpty(how ? "Nothing came." : "The answer is empty.");
    },
  };
}

function setRunning(isRunning) {
  $("send").setAttribute("aria-disabled", String(isRunning));
  $("stop").setAttribute("aria-disabled", String(!isRunning));
  $("answer").setAttribute("aria-busy", String(isRunning));
  if (isRunning) $("copy-answer").disabled = true;
}

function setStatus(text) {
  $("status").textContent = text;
}

function showBadge(text) {
  $("finish").textContent = text;
  $("finish").hidden = !text;
  $("finish").dataset.kind = { [DONE.stop]: "good", [DONE.error]: "bad" }[text] ?? "notable";
}

function showEmpty(text) {
  $("empty").textContent = text;
  $("empty").hidden = !text;
}

function showRequestId(id) {
  $("request-id").textContent = id ? `Request ${id}` : "";
  $("request-id").hidden = !id;
}

function showError(error) {
  $("error").hidden = !error;
  $("answer-box").hidden = error !== null && $("answer").textContent === "";
  if (!error) return;
  const isOurs = error instanceof ApiError;
  const wait = isOurs && error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  $("error-code").textContent = isOurs ? error.code : error.name;
  $("error-status").textContent = isOurs && error.status ? `HTTP ${error.status}` : "";
  $("error-message").textContent = error.message;
  $("error-hint").textContent = ((isOurs ? error.hint : "") + wait).trim();
  if (isOurs && error.status === 401) askForKey();
}

function seconds(milliseconds) {
  return milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(2)} s`;
}

function tokens(count) {
  return `${count.toLocaleString("en")} tok`;
}

// --- the request as code ---------------------------------------------------------------------------------------------

function showCode() {
  $("schema-note").textContent = $("schema-field").open ? "" : hasSchema() ? "left out while closed" : "optional";
  const base = new URL("v1", document.baseURI).href;
  const write = $("tab-python").ariaSelected === "true" ? asPython : asCurl;
  $("code").textContent = write(requestBody(), { base, hasKey: key !== "" || isLocked });
}

function chooseTab(chosen) {
  for (const tab of [$("tab-curl"), $("tab-python")]) {
    tab.ariaSelected = String(tab === chosen);
    tab.tabIndex = tab === chosen ? 0 : -1;
  }
  $("code-panel").setAttribute("aria-labelledby", chosen.id);
  showCode();
}

async function copy(button) {
  const source = $(button.dataset.copies);
  let said = "Copied";
  try {
    await navigator.clipboard.writeText(source.textContent);
  } catch {
    getSelection().selectAllChildren(source); // a page without TLS may not write to the clipboard
    said = "Selected";
  }
  button.textContent = said;
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

// --- the key ---------------------------------------------------------------------------------------------------------

function askForKey() {
  isLocked = true;
  $("key-problem").textContent = key ? "This server does not know that key." : "This server asks for a key.";
  $("key-problem").hidden = false;
  $("key-panel").showPopover();
  $("key").focus();
}

function useKey() {
  key = $("key").value.trim();
  if ($("keep-key").checked && key) sessionStorage.setItem(KEY_ITEM, key);
  else sessionStorage.removeItem(KEY_ITEM);
  $("key-set").hidden = !key;
  $("key-problem").hidden = true;
  $("key-panel").hidePopover();
  loadModels();
}

// --- wiring ----------------------------------------------------------------------------------------------------------

function wire() {
  $("request").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("request").addEventListener("input", () => {
    if (!running) setStatus("");
    showCode();
  });
  $("model").addEventListener("change", showExpert);
  $("schema-field").addEventListener("toggle", showCode);
  $("stop").addEventListener("click", () => running?.abort());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      send();
    } else if (event.key === "Escape" && running) {
      event.preventDefault();
      running.abort();
    }
  });
  for (const button of [$("copy-answer"), $("copy-code")]) button.addEventListener("click", () => copy(button));
  for (const [tab, other] of [[$("tab-curl"), $("tab-python")], [$("tab-python"), $("tab-curl")]]) {
    tab.addEventListener("click", () => chooseTab(tab));
    tab.addEventListener("keydown", (event) => {
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
      chooseTab(other);
      other.focus();
    });
  }
  $("key-panel").addEventListener("submit", (event) => {
    event.preventDefault();
    useKey();
  });
  $("key").value = key;
  $("keep-key").checked = key !== "";
  $("key-set").hidden = !key;
  if (/Mac|iP(hone|ad)/.test(navigator.userAgent)) $("send-keys").textContent = "⌘ ↵";
}

wire();
// The examples are a convenience for the demo's experts: without them the page is whole.
examples = await fetch(new URL("playground/examples.json", document.baseURI))
  .then((file) => file.json())
  .catch(() => ({}));
await loadModels();

// A conversation with the model, streamed.

import { request } from "./api.js";

const PAUSE = 0.7; // seconds of silence after which a stream counts as paused
const MOST_TOKENS = 1024;
const TEMPERATURE = 0.5; // at 1, which is the API's default, small models ramble
const find = (id) => document.getElementById(id);
const seconds = () => performance.now() / 1000;

/** The objects of a stream of server-sent events, until [DONE]. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The stream ended before the answer did.");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue; // a comment that keeps the connection open
      if (part === "data: [DONE]") return;
      yield JSON.parse(part.slice(6));
    }
  }
}

export class Chat {
  /** `now()` tells the status of the server and the name of its model. */
  constructor(now) {
    this.now = now;
    this.messages = [];
    this.running = null;
    find("chat-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    find("prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    find("stop").addEventListener("click", () => this.running?.abort());
    find("clear").addEventListener("click", () => {
      this.running?.abort();
      this.messages = [];
      find("messages").replaceChildren();
      this.tell("");
    });
  }

  get busy() {
    return this.running !== null;
  }

  async send() {
    const text = find("prompt").value.trim();
    if (!text || this.busy) return;
    find("prompt").value = "";
    this.messages.push({ role: "user", content: text });
    this.show("user", "You", text);
    const shown = this.show("assistant", this.now().model, "");
    const asked = this.messages;
    const run = (this.running = new AbortController());
    this.buttons();
    const count = { began: seconds(), first: null, last: null, tokens: 0, pause: 0 };
    const ticking = setInterval(() => this.tick(count, shown), 100);
    let answer = "";
    let failure = null;
    try {
      for await (const event of this.stream(asked, run.signal)) {
        const choice = event.choices[0];
        const piece = choice?.delta.content ?? "";
        if (choice?.token_ids?.length) this.count(count, choice.token_ids.length);
        answer += piece;
        if (piece) this.append(shown, piece);
      }
    } catch (error) {
      if (!run.signal.aborted) failure = error.message;
    } finally {
      clearInterval(ticking);
      shown.removeAttribute("data-paused");
      this.running = null;
      this.buttons();
    }
    // It was cleared meanwhile.
    if (asked !== this.messages) return;
    if (answer) asked.push({ role: "assistant", content: answer });
    else asked.pop();
    if (failure) this.show("error", "Error", failure);
    this.tell(this.summary(count, run.signal.aborted));
  }

  async *stream(messages, signal) {
    const body = {
      model: this.now().model, messages, stream: true, max_tokens: this.most(), return_token_ids: true,
      temperature: TEMPERATURE,
    };
    const response = await request("/v1/chat/completions", {
      method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }

  /** As many tokens as leave the conversation some room. */
  most() {
    return Math.max(1, Math.min(MOST_TOKENS, Math.floor(this.now().length / 2)));
  }

  count(count, tokens) {
    const now = seconds();
    count.first ??= now;
    if (count.last !== null) count.pause = Math.max(count.pause, now - count.last);
    count.last = now;
    count.tokens += tokens;
  }

  tick(count, shown) {
    const silent = seconds() - (count.last ?? count.began);
    const paused = silent > PAUSE;
    shown.toggleAttribute("data-paused", paused);
    const why = this.now().status === "recovering" ? "devices are being replaced, the answer goes on then" : "waiting";
    const what = count.last === null ? "no token yet" : `${count.tokens} tokens`;
    this.tell(paused ? `${what}; silent for ${silent.toFixed(1)} s: ${why}` : what, paused);
  }

  summary(count, stopped) {
    if (count.first === null) return stopped ? "stopped" : "";
    const took = count.last - count.first;
    const rate = took > 0 ? `, ${((count.tokens - 1) / took).toFixed(1)} tokens/s` : "";
    const pause = count.pause > PAUSE ? `, longest pause ${count.pause.toFixed(1)} s` : "";
    const first = `first after ${(count.first - count.began).toFixed(2)} s`;
    return `${count.tokens} tokens, ${first}${rate}${pause}${stopped ? ", stopped" : ""}`;
  }

  show(role, who, text) {
    const message = document.createElement("div");
    const name = document.createElement("span");
    const said = document.createElement("span");
    message.className = "message";
    message.dataset.role = role;
    name.className = "who";
    name.textContent = who;
    said.className = "said";
    message.append(name, said);
    find("messages").append(message);
    this.append(message, text);
    return message;
  }

  append(message, text) {
    const box = find("messages");
    const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    message.lastChild.append(text);
    if (atEnd) box.scrollTop = box.scrollHeight;
  }

  tell(text, paused = false) {
    find("progress").textContent = text;
    find("progress").toggleAttribute("data-paused", paused);
  }

  buttons() {
    find("send").disabled = this.busy;
    find("stop").hidden = !this.busy;
  }
}

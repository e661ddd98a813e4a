// Requests to the server that this page came from, with the key that the user gave.

const NAME = "ryzanstein-key";
const dialog = document.getElementById("key-dialog");
const form = document.getElementById("key-form");
const input = document.getElementById("key");
const problem = document.getElementById("key-problem");
let asking = null;

export const hasKey = () => sessionStorage.getItem(NAME) !== null;

// Without a key there is nothing to show, so Escape does not help.
dialog.addEventListener("cancel", (event) => event.preventDefault());
dialog.addEventListener("close", () => asking && dialog.showModal());

/** Asks for a key, once for all who wait for it. */
export function askKey(text) {
  asking ??= new Promise((resolve) => {
    problem.textContent = text;
    problem.hidden = !text;
    input.value = "";
    dialog.showModal();
    form.onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(NAME, input.value.trim());
      input.value = "";
      asking = null;
      dialog.close();
      resolve();
    };
  });
  return asking;
}

/** As fetch, with a time limit in milliseconds if wanted; where the server wants a key, the user is asked for it. */
export async function request(path, { timeout, ...options } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(NAME);
    const headers = { ...options.headers };
    // A header holds no other characters, and no key does.
    if (key !== null) headers.Authorization = `Bearer ${/^[\x21-\x7e]+$/.test(key) ? key : "?"}`;
    const signal = timeout ? AbortSignal.timeout(timeout) : options.signal;
    const response = await fetch(path, { ...options, headers, signal });
    if (response.status !== 401) return response;
    // Another request may have been given a new key meanwhile.
    if (sessionStorage.getItem(NAME) === key) await askKey(key === null ? "" : "The server does not take that key.");
  }
}

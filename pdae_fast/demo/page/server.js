// The server, and the images that it knows by their keys.

// randomUUID is only there on pages of this machine or of HTTPS.
const visitor = Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");

export class Refused extends Error {
  constructor(message, gone) { super(message); this.gone = gone; }
}

async function ask(path, body, signal) {
  let answer;
  try {
    answer = await fetch(path, { method: "POST", body, signal, headers: { "X-Visitor": visitor } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer. Is it still running?");
  }
  if (answer.status === 409) throw new DOMException("overtaken", "AbortError");
  if (!answer.ok) {
    const said = await answer.json().catch(() => ({}));
    throw new Refused(said.error ?? `The server answered ${answer.status}.`, said.gone);
  }
  return answer.headers.get("content-type").startsWith("application/json") ? answer.json() : answer.blob();
}

export async function post(what, values, signal) {
  for (let again = 3; ; again--) {
    try {
      return await ask(`api/${what}`, JSON.stringify(values), signal);
    } catch (error) {
      const picture = pictures.get(error.gone);
      if (!picture || !again) throw error;
      // The server keeps only so many images of all its visitors: it gets this one once more.
      picture.key = (await send(asBlob(picture.src), picture.name, signal)).key;
      pictures.set(picture.key, picture);
    }
  }
}

export const send = (file, name, signal) => ask(`api/upload?name=${encodeURIComponent(name)}`, file, signal);

// In a request a picture stands for its key.
class Picture {
  constructor(key, name, src) { Object.assign(this, { key, name, src }); }
  toJSON() { return this.key; }
}
const pictures = new Map(); // by key
function pictureOf(key, name, src) {
  if (!pictures.has(key)) pictures.set(key, new Picture(key, name, src));
  return pictures.get(key);
}
export const offered = (key) => pictureOf(key, key, `api/image/${key}.png`);
export const kept = (found) => pictureOf(found.key, found.name, found.image);

export const asBlob = (uri) => {
  const [head, data] = uri.split(",");
  return new Blob([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], { type: head.slice(5, head.indexOf(";")) });
};

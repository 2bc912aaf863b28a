// Serves this folder and a bundle at http://localhost:8000: node serve.mjs BUNDLE [PORT]
import { createServer } from "node:http";
import { readFile } from "node:fs/promises";
import { dirname, extname, join, normalize, resolve, sep } from "node:path";
import { fileURLToPath } from "node:url";

const [bundle = "../../build/lite0.bundle", port = "8000"] = process.argv.slice(2);
const here = dirname(fileURLToPath(import.meta.url));
const TYPES = { ".html": "text/html", ".mjs": "text/javascript", ".js": "text/javascript", ".json": "application/json",
                ".wasm": "application/wasm" };

createServer(async (request, response) => {
  try {
    const path = normalize(decodeURIComponent(new URL(request.url, "http://localhost").pathname));
    const [root, file] = path.startsWith(`${sep}bundle${sep}`) ? [resolve(bundle), path.slice(8)] : [here, path];
    const content = await readFile(join(root, file === sep ? "index.html" : file));
    // With these two headers a browser lets WebAssembly use threads.
    response.writeHead(200, { "Content-Type": TYPES[extname(file)] ?? (file === sep ? "text/html" : "application/octet-stream"),
                              "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" });
    response.end(content);
  } catch {
    response.writeHead(404).end("there is no such file");
  }
}).listen(Number(port), "localhost", () => console.log(`http://localhost:${port} shows ${bundle}`));

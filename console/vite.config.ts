import { readFile, writeFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { brotliCompressSync, constants, gzipSync } from "node:zlib";
import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig, type Plugin } from "vite";

/** Limit of the scripts and styles that the first page loads, compressed with gzip. */
const INITIAL_MAX_KB = 90;

/** Writes `.br` and `.gz` beside each file, and fails if the first page loads too much. */
function compress(): Plugin {
  return {
    name: "compress",
    apply: "build",
    async writeBundle(options, bundle) {
      const dir = options.dir ?? "dist";
      const html = await readFile(`${dir}/index.html`, "utf8");
      let initial = 0;
      for (const name of Object.keys(bundle)) {
        const content = await readFile(`${dir}/${name}`);
        const gzip = gzipSync(content, { level: 9 });
        const quality = { params: { [constants.BROTLI_PARAM_QUALITY]: constants.BROTLI_MAX_QUALITY } };
        await writeFile(`${dir}/${name}.gz`, gzip);
        await writeFile(`${dir}/${name}.br`, brotliCompressSync(content, quality));
        if (name !== "index.html" && html.includes(name)) initial += gzip.length;
      }
      const kb = (initial / 1000).toFixed(1);
      console.log(`initial scripts and styles: ${kb} kB of ${INITIAL_MAX_KB} kB, compressed with gzip`);
      if (initial > INITIAL_MAX_KB * 1000) this.error(`the first page loads ${kb} kB; load some of it later`);
    },
  };
}

export default defineConfig({
  base: "/console/",
  plugins: [svelte(), compress()],
  resolve: {
    alias: { "@regcred/client": fileURLToPath(new URL("../clients/typescript/src/index.ts", import.meta.url)) },
    // The client is outside this folder and has no packages of its own here.
    dedupe: ["openapi-fetch"],
  },
  build: {
    target: "es2022",
    // A data address would be style or script from elsewhere for the content security policy.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    reportCompressedSize: false,
    rolldownOptions: { checks: { pluginTimings: false } },
  },
});

import { type RegcredClient, type UntypedGet, unwrap } from "./client.js";
import type { paths } from "./schema.js";

type Page<Item> = { items: Item[]; next: string | null };
type JsonOf<Path extends keyof paths> = paths[Path] extends {
  get: { responses: { 200: { content: { "application/json": infer Json } } } };
}
  ? Json
  : never;

/** Paths of lists. */
export type ListPath = {
  [Path in keyof paths]: [JsonOf<Path>] extends [never] ? never : JsonOf<Path> extends Page<unknown> ? Path : never;
}[keyof paths];

/** Item of the list at a path. */
export type PageItem<Path extends ListPath> = JsonOf<Path> extends Page<infer Item> ? Item : never;

type ParametersOf<Path extends ListPath> = paths[Path] extends { get: { parameters: infer Parameters } }
  ? Parameters
  : never;

/** Parameters of a list: filters and `limit`, the size of a page. */
export type PagesOptions<Path extends ListPath> = { signal?: AbortSignal } & (ParametersOf<Path> extends {
  path: unknown;
}
  ? { params: ParametersOf<Path> }
  : { params?: ParametersOf<Path> });

/**
 * Iterates over the items of a list. The next page is requested when its first item is.
 *
 * @throws ProblemError if a page cannot be read
 */
export async function* pages<Path extends ListPath>(
  client: RegcredClient,
  path: Path,
  ...[options]: PagesOptions<Path> extends { params: unknown } ? [PagesOptions<Path>] : [PagesOptions<Path>?]
): AsyncGenerator<PageItem<Path>, void, undefined> {
  const params: { query?: object; path?: unknown } = options?.params ?? {};
  // The types of openapi-fetch cannot follow a path that is a type parameter.
  const get = client.GET as unknown as UntypedGet<Page<PageItem<Path>>>;
  let cursor: string | null | undefined;
  do {
    const query = { ...params.query, ...(cursor ? { cursor } : {}) };
    const page = await unwrap(get(path, { ...options, params: { ...params, query } }));
    yield* page.items;
    cursor = page.next;
  } while (cursor);
}

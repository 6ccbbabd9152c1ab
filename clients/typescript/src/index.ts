export { createClient, ifMatch, unwrap } from "./client.js";
export type { ClientOptions, JsonMedia, RegcredClient } from "./client.js";
export { events } from "./events.js";
export type { EventPath, EventsOptions, ServerEvent } from "./events.js";
export { pages } from "./pages.js";
export type { ListPath, PageItem, PagesOptions } from "./pages.js";
export { isProblem, ProblemError } from "./problem.js";
export type { Problem, ProblemSlug } from "./problem.js";
export type { components, operations, paths } from "./schema.js";

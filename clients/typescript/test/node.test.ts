import { test } from "node:test";
import * as regcred from "@regcred/client";
import { scenario } from "./scenario.ts";
import { assertObserved, environment } from "./support.ts";

test("dashboard_scenario_works_in_node", async () => {
  const node = environment("node");
  assertObserved(await scenario(regcred, node), node);
});

import { mount } from "svelte";
import "./styles/tokens.css";
import "./styles/base.css";
import App from "./App.svelte";
import { startLocale } from "./lib/i18n.svelte.ts";
import { startTheme } from "./lib/theme.svelte.ts";

startTheme();
await startLocale();
const target = document.getElementById("app");
if (target) mount(App, { target });

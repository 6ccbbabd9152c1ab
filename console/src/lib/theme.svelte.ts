/** Colours: those of the system, unless the person chose others. */

export const THEMES = ["system", "light", "dark", "contrast"] as const;
export type Theme = (typeof THEMES)[number];

const KEY = "regcred.theme";

export const theme = $state<{ chosen: Theme }>({ chosen: "system" });

function apply(): void {
  const isContrast = matchMedia("(prefers-contrast: more)").matches;
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  const system = isContrast ? "contrast" : isDark ? "dark" : "light";
  document.documentElement.dataset["theme"] = theme.chosen === "system" ? system : theme.chosen;
}

export function startTheme(): void {
  const stored = localStorage.getItem(KEY);
  theme.chosen = THEMES.find((known) => known === stored) ?? "system";
  apply();
  for (const query of ["(prefers-color-scheme: dark)", "(prefers-contrast: more)"]) {
    matchMedia(query).addEventListener("change", apply);
  }
}

export function chooseTheme(chosen: Theme): void {
  theme.chosen = chosen;
  localStorage.setItem(KEY, chosen);
  apply();
}

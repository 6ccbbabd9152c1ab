import { en } from "../locales/en.ts";

/** Texts of the console. A language is one file with the same names; a missing text is a compile error. */
export type Texts = { [Name in keyof typeof en]: string };
export type TextName = keyof Texts;

export const LANGUAGES = { en: "English", "zh-CN": "简体中文" } as const;
export type Language = keyof typeof LANGUAGES;

const KEY = "regcred.language";

class Shown {
  value = $state.raw<{ language: Language; texts: Texts }>({ language: "en", texts: en });
}
const shown = new Shown();

export function language(): Language {
  return shown.value.language;
}

export async function chooseLanguage(chosen: Language): Promise<void> {
  const texts: Texts = chosen === "en" ? en : (await import("../locales/zh-CN.ts")).zhCn;
  localStorage.setItem(KEY, chosen);
  shown.value = { language: chosen, texts };
  document.documentElement.lang = chosen;
}

/** Uses the chosen language, or the first one of the browser that exists. */
export async function startLocale(): Promise<void> {
  const stored = localStorage.getItem(KEY);
  const isChinese = stored ? stored === "zh-CN" : navigator.languages.find((tag) => /^(zh|en)/.test(tag))?.startsWith("zh");
  if (isChinese) await chooseLanguage("zh-CN");
}

/** Text with this name. `{name}` stands for a value; `{n|one|other}` chooses by number. */
export function t(name: TextName, values: Record<string, string | number> = {}): string {
  return shown.value.texts[name].replace(/\{(\w+)(?:\|([^|}]*)\|([^}]*))?\}/g, (all, key: string, one?: string, other?: string) => {
    const value = values[key];
    if (value === undefined) return all;
    if (one === undefined || other === undefined) return String(value);
    return new Intl.PluralRules(shown.value.language).select(Number(value)) === "one" ? one : other;
  });
}

/** Text for a word of the API, such as a state; the word itself if this release has no text for it. */
export function word(prefix: string, value: string): string {
  const name = `${prefix}.${value}`;
  return name in shown.value.texts ? t(name as TextName) : value;
}

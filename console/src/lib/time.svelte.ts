import { language } from "./i18n.svelte.ts";

/** The present, for texts such as "2 minutes ago". */
const clock = $state({ now: Date.now() });
setInterval(tick, 15_000);

/** Moves the present on, so that what has just happened is not said to come. */
export function tick(): void {
  clock.now = Date.now();
}

const UNITS = [
  ["year", 31_557_600],
  ["month", 2_629_800],
  ["day", 86_400],
  ["hour", 3_600],
  ["minute", 60],
  ["second", 1],
] as const;

/** Distance to a time in words, such as "in 3 days". */
export function relative(at: string): string {
  // The clock decides when the text is written anew; it may be late itself.
  const seconds = (Date.parse(at) - Math.max(clock.now, Date.now())) / 1000;
  const [unit, size] = UNITS.find(([, size]) => Math.abs(seconds) >= size) ?? UNITS[5];
  return new Intl.RelativeTimeFormat(language(), { numeric: "auto" }).format(Math.trunc(seconds / size), unit);
}

/** Date and time, in the time zone of the browser. */
export function absolute(at: string): string {
  return new Intl.DateTimeFormat(language(), { dateStyle: "medium", timeStyle: "short" }).format(new Date(at));
}

export function isPast(at: string): boolean {
  return Date.parse(at) < clock.now;
}

/** Whether a time is within this number of days, or past. */
export function isSoon(at: string, days = 30): boolean {
  return Date.parse(at) < clock.now + days * 86_400_000;
}

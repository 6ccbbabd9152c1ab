/** Settings of this browser. They hold no secret. */

const KEY = "regcred.slash";

class Preferences {
  /** Whether `/` opens the command palette. People who speak to their computer turn single keys off. */
  hasSlash = $state(localStorage.getItem(KEY) !== "off");

  setSlash(isOn: boolean): void {
    this.hasSlash = isOn;
    localStorage.setItem(KEY, isOn ? "on" : "off");
  }
}

export const preferences = new Preferences();

/** Short confirmations of what was done. */
class Toasts {
  list = $state<{ id: number; text: string }[]>([]);
  #count = 0;

  add(text: string): void {
    const id = ++this.#count;
    this.list.push({ id, text });
    setTimeout(() => this.close(id), 6_000);
  }

  close(id: number): void {
    this.list = this.list.filter((toast) => toast.id !== id);
  }
}

export const toasts = new Toasts();

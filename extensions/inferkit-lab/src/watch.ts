import type { IDisposable } from '@lumino/disposable';
import { Poll } from '@lumino/polling';
import { Signal, type ISignal } from '@lumino/signaling';
import type { State } from './schema';

/** What is known: the last state, and why there is no newer one. */
export interface Seen {
  readonly state: State | null;
  readonly error: string;
}

/**
 * Asks the server for the state, as often as somebody who is seen wants it, and not at all where
 * nobody does or the page is hidden.
 */
export class Watch implements IDisposable {
  constructor(fetch: () => Promise<State>) {
    this._fetch = fetch;
    this._poll = new Poll({
      auto: false,
      name: 'inferkit-lab:state',
      standby: 'when-hidden',
      factory: () => this._ask()
    });
  }

  /** What is known. */
  get seen(): Seen {
    return this._seen;
  }

  /** Emitted when that has changed. */
  get changed(): ISignal<this, Seen> {
    return this._changed;
  }

  /** Whether the server is asked from time to time. */
  get active(): boolean {
    return !this.isDisposed && this._wishes.size > 0;
  }

  get isDisposed(): boolean {
    return this._poll.isDisposed;
  }

  /**
   * Say how often somebody wants to be told.
   *
   * @param who - Whose wish it is; a new one takes the place of the last.
   * @param interval - Milliseconds; null for not at all.
   */
  want(who: string, interval: number | null): void {
    if (this.isDisposed || this._wishes.get(who) === (interval ?? undefined)) {
      return;
    }
    if (interval === null) {
      this._wishes.delete(who);
    } else {
      this._wishes.set(who, interval);
    }
    if (this._wishes.size === 0) {
      void this._poll.stop();
      return;
    }
    const least = Math.min(...this._wishes.values());
    this._poll.frequency = {
      interval: least,
      backoff: true,
      max: Math.max(least, SLOWEST)
    };
    void this._poll.refresh();
  }

  /** Ask now. */
  async refresh(): Promise<void> {
    if (!this.isDisposed) {
      await this._ask().catch(() => undefined); // shown: see `seen`
    }
  }

  dispose(): void {
    this._poll.dispose();
    Signal.clearData(this);
  }

  private async _ask(): Promise<void> {
    this._asked += 1;
    const number = this._asked;
    try {
      this._tell(number, { state: await this._fetch(), error: '' });
    } catch (error) {
      const { state } = this._seen;
      this._tell(number, { state, error: messageOf(error) });
      throw error; // the poll backs off
    }
  }

  /** What is known by the answer to a question; one that was overtaken tells nothing new. */
  private _tell(number: number, seen: Seen): void {
    if (!this.isDisposed && number > this._told) {
      this._told = number;
      this._seen = seen;
      this._changed.emit(seen);
    }
  }

  private readonly _fetch: () => Promise<State>;
  private readonly _poll: Poll;
  private readonly _wishes = new Map<string, number>();
  private readonly _changed = new Signal<this, Seen>(this);
  private _asked = 0;
  private _told = 0;
  private _seen: Seen = { state: null, error: '' };
}

/** Milliseconds between two looks for a server that is gone, which somebody waits for. */
const SLOWEST = 5000;

/** What an error says. */
export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

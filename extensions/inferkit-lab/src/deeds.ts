import type { Answer } from './schema';

/** The notebook that is in front, as far as the sidebar has to do with it. */
export interface Current {
  readonly kernelId: string;
  readonly name: string;
}

/** What the sidebar can have done. */
export interface Deeds {
  /** Have a kernel do something; gives its answer. */
  act(
    kernelId: string,
    name: string,
    given?: Record<string, string | number>
  ): Promise<Answer>;
  /** Show a kernel's notebook. */
  open(kernelId: string): void;
  /** Show the panel of a model in a tab. */
  showTab(kernelId: string, model: string): void;
  /** Put the panel of a model into its kernel's notebook. */
  insertPanel(kernelId: string, model: string): void;
  /** Put code into a kernel's notebook. */
  insertCode(kernelId: string, code: string): void;
  /** Save the experiment of a kernel, and show the link to it. */
  share(kernelId: string): void;
  /** Make a notebook that is ready for inference. */
  create(): void;
}

import type { LabIcon } from '@jupyterlab/ui-components';
import { LabIcon as Icon } from '@jupyterlab/ui-components';

/** A pulse of tokens: what the sidebar, its commands and the launcher are known by. */
export const inferenceIcon: LabIcon = new Icon({
  name: 'inferkit:inference',
  svgstr:
    '<svg xmlns="http://www.w3.org/2000/svg" width="16" viewBox="0 0 24 24">' +
    '<path class="jp-icon3 jp-icon-selectable" fill="#616161" d="M3 3h2v16h16v2H3z' +
    'm4 11 4-6 3.2 4.2L19.4 5 21 6.2l-6.7 9.4L11.1 11.4l-2.5 3.7z"/></svg>'
});

/** Ids of the commands. */
export const commandIds = {
  show: 'inferkit:show',
  load: 'inferkit:load',
  panel: 'inferkit:panel',
  tab: 'inferkit:panel-tab',
  stop: 'inferkit:stop',
  share: 'inferkit:share',
  create: 'inferkit:new-notebook'
} as const;

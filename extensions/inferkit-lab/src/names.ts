import type { LabIcon } from '@jupyterlab/ui-components';
import { LabIcon as Icon } from '@jupyterlab/ui-components';

const svg = (fill: string): string =>
  '<svg xmlns="http://www.w3.org/2000/svg" width="16" viewBox="0 0 24 24">' +
  `<path class="jp-icon3 jp-icon-selectable" fill="${fill}" d="M3 3h2v16h16v2H3z` +
  'm4 11 4-6 3.2 4.2L19.4 5 21 6.2l-6.7 9.4L11.1 11.4l-2.5 3.7z"/></svg>';

/** A pulse of tokens: what the sidebar and its commands are known by. */
export const inferenceIcon: LabIcon = new Icon({
  name: 'inferkit:inference',
  svgstr: svg('#616161')
});

/** The address of the same for the launcher, in a colour that no theme changes. */
export const launcherIcon = `data:image/svg+xml,${encodeURIComponent(svg('#1e88e5'))}`;

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

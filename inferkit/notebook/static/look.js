// Colours, and numbers as people read them.

// Okabe and Ito's colours, as in inferkit/look.py: told apart by colour-blind readers too.
const BLUE = "#0072B2", ORANGE = "#E69F00", GREEN = "#009E73";
const SKY = "#56B4E9", VERMILION = "#D55E00", PURPLE = "#CC79A7";
const DOTS = [BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION];

const ms = (value) => (value >= 99.95 ? value.toFixed(0) : value.toFixed(1));
const size = (bytes) =>
  bytes >= 2 ** 30 ? `${(bytes / 2 ** 30).toFixed(1)} GiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`;

function clock(seconds) {
  const whole = Math.floor(seconds / 60);
  if (!whole) return `${+seconds.toFixed(2)} s`;
  const rest = +(seconds - 60 * whole).toFixed(1);
  return `${whole}:${String(rest).padStart(rest % 1 ? 4 : 2, "0")}`;
}

// What is drawn on a plot's canvas by us: dots, marks and steps. `u` is a uPlot, whose scales place it.

function inside(u, draw) {
  const { ctx } = u;
  ctx.save();
  ctx.beginPath();
  ctx.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height);
  ctx.clip();
  ctx.textAlign = "left";
  ctx.textBaseline = "alphabetic";
  draw(ctx, devicePixelRatio || 1);
  ctx.restore();
}

function drawDots(u, store) {
  const [times, gaps, owners] = store.tables.tokens;
  const { min, max } = u.scales.x;
  const start = lowerBound(times, min), end = lowerBound(times, max + 1e-9);
  const top = u.scales.y.max;
  inside(u, (ctx, ratio) => {
    const side = Math.max(2, Math.min(4.5, 2_000 / Math.max(1, end - start))) * ratio;
    ctx.globalAlpha = end - start > 3_000 ? 0.6 : 0.85;
    for (let colour = 0; colour < DOTS.length; colour++) {
      ctx.fillStyle = DOTS[colour];
      for (let i = start; i < end; i++) {
        if (owners[i] % DOTS.length !== colour) continue;
        const x = u.valToPos(times[i], "x", true);
        if (gaps[i] <= top) {
          ctx.fillRect(x - side / 2, u.valToPos(gaps[i], "y", true) - side / 2, side, side);
        } else {
          triangle(ctx, x, u.bbox.top + ratio, 5 * ratio);
        }
      }
    }
  });
}

function triangle(ctx, x, y, half) {
  ctx.beginPath();
  ctx.moveTo(x, y);
  ctx.lineTo(x + half, y + 1.6 * half);
  ctx.lineTo(x - half, y + 1.6 * half);
  ctx.fill();
}

// Text with a rim of the background, so that it can be read over lines and dots.
function write(ctx, text, x, y, ratio, theme) {
  ctx.save();
  ctx.setLineDash([]);
  ctx.lineJoin = "round";
  ctx.lineWidth = 4 * ratio;
  ctx.strokeStyle = theme.back;
  ctx.strokeText(text, x, y);
  ctx.fillStyle = theme.ink;
  ctx.fillText(text, x, y);
  ctx.restore();
}

function drawFirsts(u, store, theme) {
  const [times, ttfts, owners] = store.tables.firsts;
  const start = lowerBound(times, u.scales.x.min);
  const end = lowerBound(times, u.scales.x.max + 1e-9);
  inside(u, (ctx, ratio) => {
    ctx.font = theme.font.replace("11px", `${11 * ratio}px`);
    const y = u.bbox.top + u.bbox.height - 6 * ratio, half = 5 * ratio;
    const right = u.bbox.left + u.bbox.width;
    const places = times.slice(start, end).map((time) => u.valToPos(time, "x", true));
    places.forEach((x, i) => {
      ctx.fillStyle = DOTS[owners[start + i] % DOTS.length];
      ctx.beginPath();
      ctx.moveTo(x, y - half);
      ctx.lineTo(x + half, y);
      ctx.lineTo(x, y + half);
      ctx.lineTo(x - half, y);
      ctx.fill();
      // Those that come at one moment are told of once, where there is room.
      const text = `TTFT ${ms(ttfts[start + i])} ms`;
      const room = (places[i + 1] ?? right) - x - 2 * half;
      if (room < ctx.measureText(text).width + 4 * ratio) return;
      write(ctx, text, x + half + 4 * ratio, y + 4 * ratio, ratio, theme);
    });
  });
}

function drawMarks(u, store, theme, labelled) {
  const { min, max } = u.scales.x;
  inside(u, (ctx, ratio) => {
    ctx.font = theme.font.replace("11px", `${11 * ratio}px`);
    ctx.strokeStyle = theme.ink;
    ctx.lineWidth = ratio;
    ctx.setLineDash([4 * ratio, 3 * ratio]);
    let lane = 0, free = -Infinity;
    for (const [time, label] of store.marks) {
      if (time < min || time > max) continue;
      const x = u.valToPos(time, "x", true);
      ctx.beginPath();
      ctx.moveTo(x, u.bbox.top);
      ctx.lineTo(x, u.bbox.top + u.bbox.height);
      ctx.stroke();
      if (!labelled) continue;
      const width = ctx.measureText(label).width;
      lane = x < free ? lane + 1 : 0;
      free = x + width + 8 * ratio;
      const right = x + width + 8 * ratio < u.bbox.left + u.bbox.width;
      write(ctx, label, right ? x + 4 * ratio : x - width - 4 * ratio,
        u.bbox.top + (22 + 13 * (lane % 3)) * ratio, ratio, theme);
    }
  });
}

function drawSteps(u, store, theme) {
  const [times, durations, prefills, decodes] = store.tables.steps;
  const { min, max } = u.scales.x;
  const start = Math.max(0, lowerBound(times, min) - 1), end = lowerBound(times, max + 1e-9);
  const base = u.valToPos(0, "y", true);
  inside(u, (ctx, ratio) => {
    ctx.font = theme.font.replace("11px", `${10 * ratio}px`);
    for (let i = start; i < end; i++) {
      if (!isStep(store.tables.steps, i)) continue;
      const left = u.valToPos(times[i], "x", true);
      const right = u.valToPos(times[i] + durations[i] / 1e3, "x", true);
      const top = u.valToPos(durations[i], "y", true);
      ctx.fillStyle = prefills[i] ? ORANGE : BLUE;
      ctx.globalAlpha = 0.8;
      ctx.fillRect(left, top, Math.max(ratio, right - left - ratio / 2), base - top);
      const text = `${prefills[i]}+${decodes[i]}`;
      if (right - left > ctx.measureText(text).width + 4 * ratio) {
        ctx.globalAlpha = 1;
        ctx.fillStyle = theme.ink;
        ctx.fillText(text, left + 2 * ratio, Math.max(top - 3 * ratio, u.bbox.top + 10 * ratio));
      }
    }
  });
}

// Elements, and the few controls that ipywidgets and the browser do not have.

// An element with attributes (an "on..." one is a listener) and children.
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// A row of buttons of which one is pressed; arrow keys move, as in a radio group.
function segments(label, values, picked) {
  const element = h("div", { class: "ik-segments", role: "radiogroup", "aria-label": label });
  const buttons = values.map((value) =>
    h("button", { type: "button", role: "radio", onclick: () => pick(value) }, value));
  element.append(...buttons);
  let current = null;

  function set(value) {
    current = value;
    buttons.forEach((button, i) => {
      const on = values[i] === value;
      button.setAttribute("aria-checked", String(on));
      button.tabIndex = on || (!values.includes(value) && i === 0) ? 0 : -1;
    });
  }

  function pick(value) {
    if (value === current || element.hasAttribute("aria-disabled")) return;
    set(value);
    picked(value);
  }

  element.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const at = (Math.max(0, values.indexOf(current)) + step + values.length) % values.length;
    buttons[at].focus();
    pick(values[at]);
  });
  set(null);
  return {
    element,
    set,
    disable(off) {
      if (off) element.setAttribute("aria-disabled", "true");
      else element.removeAttribute("aria-disabled");
      buttons.forEach((button) => (button.disabled = off));
    },
  };
}

// A labelled control, with a place for what is wrong with what was typed.
let fields = 0;
function field(label, control, hint = "") {
  const id = `ik-field-${++fields}`;
  const message = h("div", { class: "ik-wrong", id: `${id}-wrong`, role: "alert", hidden: true });
  const target = control.matches("input, textarea, select") ? control : null;
  if (target) {
    target.id = id;
    target.setAttribute("aria-describedby", message.id);
  }
  const element = h("div", { class: "ik-field" },
    h("label", target ? { for: id, title: hint } : { title: hint }, label), control, message);
  return {
    element,
    wrong(text) {
      message.textContent = text ?? "";
      message.hidden = !text;
      element.classList.toggle("ik-bad", Boolean(text));
      target?.setAttribute("aria-invalid", String(Boolean(text)));
    },
  };
}

// Copies text; where the browser does not let it, false.
async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

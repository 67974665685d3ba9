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

// A name that no other element of the page has; each widget brings a copy of this module.
function unique(kind) {
  globalThis.__inferkit_count = (globalThis.__inferkit_count ?? 0) + 1;
  return `ik-${kind}-${globalThis.__inferkit_count}`;
}

// A row of buttons of which one is pressed.
function segments(label, values, picked) {
  const element = h("div", { class: "ik-segments", role: "group", "aria-label": label });
  let current = null;

  function set(value) {
    current = value;
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(values[i] === value)));
  }

  function pick(value) {
    if (value === current || element.getAttribute("aria-disabled") === "true") return;
    set(value);
    picked(value);
  }

  const buttons = values.map((value) =>
    h("button", { type: "button", onclick: () => pick(value) }, value));
  element.append(...buttons);
  set(null);
  // Not `disabled`, which would take the focus away from whoever has just pressed one.
  return { element, set, disable: (off) => element.setAttribute("aria-disabled", String(off)) };
}

// A labelled control, with a place for what is wrong with what was typed.
function field(label, control, hint = "") {
  const id = unique("field");
  const message = h("div", { class: "ik-wrong", id: `${id}-wrong`, role: "alert", hidden: true });
  const target = control.matches("input, textarea, select") ? control : null;
  if (target) target.id = id;
  control.setAttribute("aria-describedby", message.id);
  const element = h("div", { class: "ik-field" },
    h("label", target ? { for: id, title: hint } : { title: hint }, label), control, message);
  return {
    element,
    wrong(text = "") {
      if (message.textContent === text) return;
      message.textContent = text;
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
